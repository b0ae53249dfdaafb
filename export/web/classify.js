// Classify the canvas with an exported model. `?model=URL&image=URL` loads both at once.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1; // more need a server that sends cross-origin isolation headers
ort.env.logLevel = "error";
const element = (id) => document.getElementById(id);
const canvas = element("canvas");
const pen = canvas.getContext("2d", { willReadFrequently: true });
const say = (text) => (element("status").textContent = text);
let model = null; // { session, classes, size, channels }
let source = canvas; // what is classified: the canvas, or an image at its own resolution

// onnxruntime-web does not tell a model's metadata: field 14 of its protobuf, entries of key (1) and value (2).
function metadata(bytes) {
  const found = {};
  for (const [field, entry] of fields(bytes)) {
    if (field !== 14) continue;
    const [key, value] = [...fields(entry)].map(([, text]) => new TextDecoder().decode(text));
    found[key] = value;
  }
  return found;
}

// The length-delimited fields of a protobuf message, as [number, bytes].
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0, scale = 1, byte;
    do {
      byte = bytes[at++];
      value += (byte & 127) * scale;
      scale *= 128;
    } while (byte > 127);
    return value;
  };
  while (at < bytes.length) {
    const tag = varint();
    const wire = tag % 8;
    if (wire === 0) varint();
    else if (wire === 1) at += 8;
    else if (wire === 5) at += 4;
    else if (wire === 2) {
      const length = varint();
      yield [Math.floor(tag / 8), bytes.subarray(at, at + length)];
      at += length;
    } else throw new Error("not an ONNX model");
  }
}

async function loadModel(bytes) {
  const { classes, image_size, channels } = metadata(bytes);
  if (!classes) throw new Error("not a model that nodeshape exported");
  const session = await ort.InferenceSession.create(bytes);
  model = { session, classes: JSON.parse(classes), size: Number(image_size), channels: channels === "rgb" ? 3 : 1 };
  say("Model loaded.");
  await classify();
}

async function showImage(blob) {
  source = await createImageBitmap(blob);
  const scale = Math.min(canvas.width / source.width, canvas.height / source.height);
  pen.imageSmoothingEnabled = scale < 1;
  fill("white");
  const [width, height] = [source.width * scale, source.height * scale];
  pen.drawImage(source, (canvas.width - width) / 2, (canvas.height - height) / 2, width, height);
  await classify();
}

// Scale the source to fit the model's square, aspect kept, on the colour of its top left pixel: float32 in [0, 1].
function pixels() {
  const { size, channels } = model;
  const square = new OffscreenCanvas(size, size).getContext("2d");
  square.imageSmoothingQuality = "high";
  const corner = new OffscreenCanvas(1, 1).getContext("2d");
  corner.drawImage(source, 0, 0);
  square.fillStyle = `rgb(${[...corner.getImageData(0, 0, 1, 1).data.slice(0, 3)].join()})`;
  square.fillRect(0, 0, size, size);
  const scale = size / Math.max(source.width, source.height);
  const [width, height] = [source.width * scale, source.height * scale];
  square.drawImage(source, (size - width) / 2, (size - height) / 2, width, height);
  const { data } = square.getImageData(0, 0, size, size);
  const values = new Float32Array(channels * size * size);
  for (let i = 0; i < size * size; i++) {
    const [r, g, b] = data.subarray(4 * i, 4 * i + 3);
    if (channels === 1) values[i] = Math.round(0.299 * r + 0.587 * g + 0.114 * b) / 255;
    else [r, g, b].forEach((value, c) => (values[c * size * size + i] = value / 255));
  }
  return new ort.Tensor("float32", values, [1, channels, size, size]);
}

async function classify() {
  if (!model) return;
  const start = performance.now();
  const { logits } = await model.session.run({ image: pixels() }, ["logits"]);
  const milliseconds = performance.now() - start;
  const largest = Math.max(...logits.data);
  const exponentials = [...logits.data].map((x) => Math.exp(x - largest));
  const sum = exponentials.reduce((a, b) => a + b);
  const rows = exponentials.map((x, i) => ({ name: model.classes[i], probability: x / sum }));
  rows.sort((a, b) => b.probability - a.probability);
  element("result").replaceChildren(...rows.flatMap(({ name, probability }) => {
    const [term, bar, number] = ["dt", "dd", "dd"].map((tag) => document.createElement(tag));
    term.textContent = name;
    bar.append(Object.assign(document.createElement("meter"), { value: probability }));
    number.textContent = probability.toFixed(4);
    return [term, bar, number];
  }));
  say(`Classified in ${milliseconds.toFixed(1)} ms.`);
}

function fill(colour) {
  pen.fillStyle = colour;
  pen.fillRect(0, 0, canvas.width, canvas.height);
}

function clear() {
  source = canvas;
  fill("white");
  element("result").replaceChildren();
}

const told = (action) => (...values) => Promise.resolve(action(...values)).catch((error) => say(`Error: ${error.message}`));
const bytesOf = async (blob) => new Uint8Array(await blob.arrayBuffer());
element("model").onchange = told(async (event) => loadModel(await bytesOf(event.target.files[0])));
element("image").onchange = told((event) => showImage(event.target.files[0]));
element("clear").onclick = clear;

canvas.ondragover = (event) => (event.preventDefault(), canvas.classList.add("over"));
canvas.ondragleave = () => canvas.classList.remove("over");
canvas.ondrop = told((event) => {
  event.preventDefault();
  canvas.classList.remove("over");
  return showImage(event.dataTransfer.files[0]);
});
canvas.onpointerdown = (event) => {
  if (source !== canvas) clear();
  canvas.setPointerCapture(event.pointerId);
  Object.assign(pen, { lineWidth: 16, lineCap: "round", lineJoin: "round", strokeStyle: "black" });
  pen.beginPath();
  pen.moveTo(event.offsetX, event.offsetY);
};
canvas.onpointermove = (event) => {
  if (!event.buttons) return;
  pen.lineTo(event.offsetX, event.offsetY);
  pen.stroke();
};
canvas.onpointerup = told(classify);

clear();
const query = new URLSearchParams(location.search);
const fetched = async (url) => {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return response.blob();
};
await told(async () => {
  if (query.has("image")) await showImage(await fetched(query.get("image")));
  if (query.has("model")) await loadModel(await bytesOf(await fetched(query.get("model"))));
})();
