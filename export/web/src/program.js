// onnxruntime's program in WebAssembly. It comes packed and is compiled on its way; onnxruntime alone would wait for all of it.

let begin = null; // the promise of what begins it
let compiled = null; // the promise of the program itself

/** Begin to fetch a program of `runtime/`; `progress` is told how many of its bytes have come, and of how many. */
export function fetchProgram(name, progress) {
  const folder = new URL("./runtime/", import.meta.url);
  begin = import(new URL(`${name}.mjs`, folder));
  compiled = compile(new URL(`${name}.wasm.packed`, folder), progress);
  for (const promise of [begin, compiled]) promise.catch(() => {}); // told once it is awaited
}

async function compile(url, progress) {
  const packed = await streamed(url, progress);
  const stream = packed.pipeThrough(new DecompressionStream("gzip"));
  return WebAssembly.compileStreaming(new Response(stream, { headers: { "Content-Type": "application/wasm" } }));
}

/** The bytes of a file as they come. */
export async function streamed(url, progress) {
  const response = await fetch(url);
  const name = new URL(url).pathname.split("/").pop();
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  const total = Number(response.headers.get("content-length") ?? 0);
  let loaded = 0;
  const transform = (part, rest) => {
    progress((loaded += part.length), total);
    rest.enqueue(part);
  };
  return response.body.pipeThrough(new TransformStream({ transform }));
}

/** What onnxruntime calls to begin: it takes this file for its own. */
export default async function (config) {
  const [program, { default: own }] = await Promise.all([compiled, begin]);
  const instantiateWasm = (imports, done) => done(new WebAssembly.Instance(program, imports), program);
  return own({ ...config, instantiateWasm });
}
