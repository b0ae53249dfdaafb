// Loads a model and runs it, beside the page, which stays quick. Messages: {load} and {run}, answered by their id.
import { metadata } from "./metadata.js";
import { fetchProgram, streamed } from "./program.js";

let ort = null; // the promise of onnxruntime
let ortOf = null; // the backend that it was loaded for
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
 * Load a model, and its head if there is one; each is a URL or bytes. WebGPU where there is one, unless told `wasm`, and
 * WebAssembly where that fails. Returns what the file says of itself, which backend runs it, and why others do not.
 */
async function load({ model: source, head: headSource, backend }) {
  const start = performance.now();
  const names = await backends(backend);
  const steps = ort && ortOf === names[0] ? { model: [0, 1] } : { runtime: [0, 1], model: [0, 1] };
  const progress = (name) => (loaded, total) => {
    steps[name] = [loaded, Math.max(total, loaded)];
    const [done, all] = Object.values(steps).reduce(([a, b], [c, d]) => [a + c, b + d]);
    self.postMessage({ progress: done / all });
  };
  prepare(names[0], progress("runtime")); // onnxruntime and the model come at the same time
  const [bytes, headBytes] = await Promise.all([
    bytesOf(source, progress("model")),
    headSource && bytesOf(headSource, () => {}),
  ]);
  const described = metadata(bytes);
  if (!described.classes || !described.image_size) throw new Error("not a model that nodeshape exported");
  const errors = [];
  for (const name of names) {
    try {
      prepare(name, progress("runtime"));
      const { InferenceSession, Tensor } = await ort;
      const options = { executionProviders: [name], graphOptimizationLevel: "all" };
      const session = await InferenceSession.create(bytes, options);
      const head = headBytes ? await InferenceSession.create(headBytes, options) : null;
      const next = {
        session,
        head,
        Tensor,
        backend: name,
        failures: errors,
        classes: JSON.parse(described.classes),
        size: Number(described.image_size),
        channels: described.channels === "rgb" ? 3 : 1,
        method: described.method ?? "",
        steps: Number(described.steps ?? 0),
      };
      await classify(next, new Uint8Array(next.channels * next.size ** 2)); // compiles what is compiled on first use
      model = next;
      const { session: _, head: __, Tensor: ___, ...told } = next;
      return { ...told, seconds: (performance.now() - start) / 1000 };
    } catch (error) {
      errors.push({ name, error: String(error?.message ?? error) }); // onnxruntime throws numbers too
    }
  }
  throw new Error(`the model does not run here (${errors.map(({ name, error }) => `${name}: ${error}`).join("; ")})`);
}

/** Let onnxruntime be on its way, for a backend. */
function prepare(name, progress) {
  if (ort && ortOf === name) return;
  ortOf = name;
  ort = runtime(name, progress);
  ort.catch(() => (ort = null)); // told where it is awaited; the next one is fetched anew
}

async function run({ pixels }) {
  const start = performance.now();
  const result = await classify(model, pixels);
  return { ...result, milliseconds: performance.now() - start };
}

/** Logits; with a trajectory also its states [steps + 1, channels, height, width], and their logits if there is a head. */
async function classify({ session, head, Tensor, size, channels }, pixels) {
  const { type } = session.inputMetadata[0];
  const values = type === "uint8" ? Uint8Array.from(pixels) : Float32Array.from(pixels, (value) => value / 255);
  const image = new Tensor(type, values, [1, channels, size, size]);
  const { logits, trajectory } = await session.run({ image });
  if (!trajectory) return { logits: logits.data };
  const states = trajectory.reshape(trajectory.dims.slice(1));
  const result = { logits: logits.data, states: states.data, shape: states.dims };
  if (head) result.logitsOverTime = (await head.run({ [head.inputNames[0]]: states }))[head.outputNames[0]].data;
  return result;
}

/** What may run the model, the best first. A GPU that the CPU plays is slower than WebAssembly, so only on demand. */
async function backends(wanted) {
  if (wanted) return wanted === "wasm" ? ["wasm"] : [wanted, "wasm"];
  try {
    const adapter = await navigator.gpu?.requestAdapter();
    const played = adapter?.info?.isFallbackAdapter ?? adapter?.isFallbackAdapter;
    return adapter && !played ? ["webgpu", "wasm"] : ["wasm"];
  } catch {
    return ["wasm"];
  }
}

async function runtime(name, progress) {
  fetchProgram(name === "webgpu" ? "ort-wasm-simd-threaded.asyncify" : "ort-wasm-simd-threaded", progress);
  const found = await import(`./runtime/ort.${name}.min.mjs`);
  found.env.logLevel = "error";
  found.env.wasm.numThreads = 1; // more need a server that sends cross-origin isolation headers
  found.env.wasm.wasmPaths = { mjs: new URL("./program.js", import.meta.url).href };
  return found;
}

async function bytesOf(source, progress) {
  if (typeof source !== "string") return source;
  return new Uint8Array(await new Response(await streamed(source, progress)).arrayBuffer());
}
