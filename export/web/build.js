// `npm run build`: dist/, a folder of static files that any web server can serve, and that works offline once visited.
import { createHash } from "node:crypto";
import { cpSync, existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { gzipSync } from "node:zlib";

const RUNTIMES = {
  "ort.wasm.min.mjs": "ort-wasm-simd-threaded",
  "ort.webgpu.min.mjs": "ort-wasm-simd-threaded.asyncify",
};

process.chdir(import.meta.dirname);
const missing = ["model.onnx", "head.onnx", "examples"].filter((name) => !existsSync(join("public", name)));
if (missing.length) {
  console.error(`public/ lacks ${missing.join(", ")}: train and export the page's model first, with: python model.py`);
  process.exit(2);
}
if (!existsSync("node_modules/onnxruntime-web")) {
  console.error("onnxruntime-web is not installed: run npm ci first");
  process.exit(2);
}

rmSync("dist", { recursive: true, force: true });
cpSync("src", "dist", { recursive: true });
cpSync("public", "dist", { recursive: true });
for (const [script, wasm] of Object.entries(RUNTIMES)) {
  const from = (file) => join("node_modules/onnxruntime-web/dist", file);
  for (const file of [script, `${wasm}.mjs`]) cpSync(from(file), join("dist/runtime", file));
  // A quarter of the size, whether or not a server packs what it sends; not .gz, which some take for a kind of sending.
  writeFileSync(join("dist/runtime", `${wasm}.wasm.packed`), gzipSync(readFileSync(from(`${wasm}.wasm`)), { level: 9 }));
}
const examples = readdirSync("dist/examples").filter((name) => name.endsWith(".png")).sort();
writeFileSync("dist/examples/list.json", JSON.stringify(examples));

// What the service worker keeps on the first visit; the WebGPU runtime, of 7 MB, only where it is used.
const files = readdirSync("dist", { recursive: true, withFileTypes: true })
  .filter((entry) => entry.isFile())
  .map((entry) => join(entry.parentPath, entry.name).slice("dist/".length).replaceAll("\\", "/"))
  .filter((file) => file !== "service-worker.js")
  .sort();
const digest = createHash("sha256");
for (const file of files) digest.update(file).update(readFileSync(join("dist", file)));
const kept = files.filter((file) => !/webgpu|asyncify/.test(file));
const header = `const VERSION = "${digest.digest("hex").slice(0, 16)}";\nconst FILES = ${JSON.stringify(["./", ...kept])};\n`;
writeFileSync("dist/service-worker.js", header + readFileSync("src/service-worker.js", "utf8"));
console.log(`Wrote dist/, ${files.length + 1} files. Look at it: npm start, then http://127.0.0.1:8000`);
