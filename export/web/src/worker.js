// Loads a model and runs it, beside the page, which stays quick. Messages: {load} and {run}, answered by their id.
import { metadata } from "./metadata.js";

let ort = null;
let model = null; // { session, head, ... }, see load
let before = Promise.resolve(); // one message after the other: a model is not replaced in the middle of a run

self.onmessage = ({ data }) => (before = before.then(() => answer(data)));

async function answer({ id, type, ...given }) {
  try {
    const result = type === "load" ? await load(given) : await run(given);
    self.postMessage({ id, result });
  } catch (error) {
    self.postMessage({ id, error: error.message });
  }
}

/**
 * Load a model, and its head if there is one; each is a URL or bytes. WebGPU where there is one, unless told `wasm`.
 * Returns what the file says of itself, and which backend runs it.
 */
async function load({ model: source, head: headSource, backend }) {
  const start = performance.now();
  const steps = ort ? { model: [0, 1] } : { runtime: [0, 1], model: [0, 1] };
  const progress = (name) => (loaded, total) => {
    steps[name] = [loaded, Math.max(total, loaded)];
    const [done, all] = Object.values(steps).reduce(([a, b], [c, d]) => [a + c, b + d]);
    self.postMessage({ progress: done / all });
  };
  const [bytes, headBytes] = await Promise.all([
    bytesOf(source, progress("model")),
    headSource && bytesOf(headSource, () => {}),
  ]);
  const described = metadata(bytes);
  if (!described.classes || !described.image_size) throw new Error("not a model that nodeshape exported");
  const errors = [];
  for (const name of await backends(backend)) {
    try {
      ort ??= await runtime(name, progress("runtime"));
      const options = { executionProviders: [name], graphOptimizationLevel: "all" };
      const session = await ort.InferenceSession.create(bytes, options);
      const head = headBytes ? await ort.InferenceSession.create(headBytes, options) : null;
      const next = {
        session,
        head,
        backend: name,
        classes: JSON.parse(described.classes),
        size: Number(described.image_size),
        channels: described.channels === "rgb" ? 3 : 1,
        method: described.method ?? "",
        steps: Number(described.steps ?? 0),
      };
      await classify(next, new Uint8Array(next.channels * next.size ** 2)); // compiles what is compiled on first use
      model = next;
      const { session: _, head: __, ...told } = next;
      return { ...told, seconds: (performance.now() - start) / 1000 };
    } catch (error) {
      ort = null;
      errors.push(`${name}: ${error.message}`);
    }
  }
  throw new Error(`the model does not run here (${errors.join("; ")})`);
}

async function run({ pixels }) {
  const start = performance.now();
  const result = await classify(model, pixels);
  return { ...result, milliseconds: performance.now() - start };
}

/** Logits; with a trajectory also its states [steps + 1, channels, height, width], and their logits if there is a head. */
async function classify({ session, head, size, channels }, pixels) {
  const { type } = session.inputMetadata[0];
  const values = type === "uint8" ? Uint8Array.from(pixels) : Float32Array.from(pixels, (value) => value / 255);
  const image = new ort.Tensor(type, values, [1, channels, size, size]);
  const { logits, trajectory } = await session.run({ image });
  if (!trajectory) return { logits: logits.data };
  const states = trajectory.reshape(trajectory.dims.slice(1));
  const result = { logits: logits.data, states: states.data, shape: states.dims };
  if (head) result.logitsOverTime = (await head.run({ [head.inputNames[0]]: states }))[head.outputNames[0]].data;
  return result;
}

async function backends(wanted) {
  if (wanted) return [wanted];
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const fallback = adapter?.info?.isFallbackAdapter ?? adapter?.isFallbackAdapter; // a GPU that the CPU plays
  return adapter && !fallback ? ["webgpu", "wasm"] : ["wasm"];
}

async function runtime(name, progress) {
  const folder = new URL("./runtime/", import.meta.url).href;
  const file = name === "webgpu" ? "ort-wasm-simd-threaded.asyncify" : "ort-wasm-simd-threaded";
  const found = await import(`./runtime/ort.${name}.min.mjs`);
  found.env.logLevel = "error";
  found.env.wasm.numThreads = 1; // more need a server that sends cross-origin isolation headers
  found.env.wasm.wasmPaths = { mjs: `${folder}${file}.mjs` };
  found.env.wasm.wasmBinary = await bytesOf(`${folder}${file}.wasm`, progress);
  return found;
}

async function bytesOf(source, progress) {
  if (typeof source !== "string") return source;
  const response = await fetch(source);
  const name = new URL(source).pathname.split("/").pop();
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  const total = Number(response.headers.get("content-length") ?? 0);
  const parts = [];
  let loaded = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    progress((loaded += value.length), total);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}
