// The page: what is drawn or chosen goes to the model in the worker, and what it answers is shown.
// ?model=URL loads another model, ?image=URL a picture, ?backend=wasm or webgpu chooses what runs the model.
import { Drawing } from "./drawing.js";
import { Flow } from "./flow.js";
import { decode, isEmpty, square } from "./pixels.js";
import { softmax } from "./softmax.js";

const element = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
const asked = new Map(); // promises of the worker's answers, by id
const BACKENDS = { wasm: "WebAssembly", webgpu: "WebGPU" };

let worker = null;
let model = null; // what the worker says of the loaded model
let loading = 0; // models that are on their way: nothing is classified meanwhile
let running = false;
let again = false; // the drawing has changed since the run began
let opened = Promise.resolve(); // what was chosen last has been dealt with
let settled = false; // the pen is up: say the answer aloud

const drawing = new Drawing(element("canvas"), element("cursor"), (isSettled) => {
  settled = isSettled;
  document.body.classList.toggle("drawn", !drawing.isBlank);
  element("clear").disabled = element("undo").disabled = drawing.isBlank;
  if (model) complain("");
  classify();
});
const flow = new Flow({
  section: element("flow"), play: element("play"), time: element("time"), now: element("now"), chart: element("chart"),
  figure: element("chart-figure"), maps: element("maps"), count: element("maps-count"),
});

function ask(message) {
  return new Promise((resolve, reject) => {
    const id = asked.size ? Math.max(...asked.keys()) + 1 : 1;
    asked.set(id, { resolve, reject });
    worker.postMessage({ id, ...message });
  });
}

function startWorker() {
  worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  worker.onmessage = ({ data: { id, result, error, progress } }) => {
    if (progress !== undefined) return void (element("progress").value = progress);
    const { resolve, reject } = asked.get(id);
    asked.delete(id);
    if (error) reject(new Error(error));
    else resolve(result);
  };
  worker.onerror = () => {
    complain("The program beside the page did not start; reload the page, or use a newer browser.");
    document.body.dataset.state = "failed";
  };
}

async function loadModel(source, head, backend = query.get("backend")) {
  loading++;
  element("loading").hidden = false;
  element("progress").value = 0;
  if (!model) document.body.dataset.state = "loading";
  try {
    model = { ...(await ask({ type: "load", model: source, head, backend })), source, head };
    showModel();
  } catch (error) {
    if (!model) {
      document.body.dataset.state = "failed";
      verdict(waiting(), true);
    }
    throw new Error(`No model was loaded: ${error.message}. Choose another below.`);
  } finally {
    loading--;
    element("loading").hidden = !loading;
    classify();
  }
}

function showModel() {
  element("classes").replaceChildren(...model.classes.map((name, i) => {
    const item = document.createElement("li");
    item.style.setProperty("--colour", `var(--class-${i % 7})`);
    item.dataset.class = name;
    item.innerHTML = '<span class="name"></span><span class="share"></span><span class="bar" aria-hidden="true"><i></i></span>';
    item.querySelector(".name").textContent = name;
    return item;
  }));
  const method = model.method.replaceAll("_", " ").replace("euler", "Euler");
  const steps = model.steps ? ` in ${model.steps} ${method} steps` : "";
  element("solver").textContent = steps;
  document.body.dataset.state = "ready";
  document.body.dataset.backend = model.backend;
  document.body.dataset.seconds = model.seconds.toFixed(3);
  about();
}

function about(milliseconds) {
  const time = milliseconds === undefined ? "" : `, ${milliseconds.toFixed(0)} ms per picture`;
  const instead = model.failures.map(({ name, error }) => ` ${BACKENDS[name] ?? name} does not run it: ${error}`).join("");
  element("about").textContent =
    `The model, of ${model.size} × ${model.size} pixels, was loaded in ${model.seconds.toFixed(1)} s and runs on ${BACKENDS[model.backend]}${time}.${instead}`;
}

/** Classify what is on the paper; while one picture is being classified, only the latest one waits. */
async function classify() {
  if (!model) return void (drawing.isBlank || verdict(waiting(), true));
  if (loading) return;
  again = running;
  if (running) return;
  running = true;
  element("answer").setAttribute("aria-busy", true);
  const current = model;
  try {
    const pixels = square(drawing.image, current.size, current.channels);
    if (isEmpty(pixels, current.channels)) return showEmpty();
    const result = await ask({ type: "run", pixels });
    if (current === model && !drawing.isBlank) show(result);
  } catch (error) {
    complain(error.message);
    if (current.backend === "webgpu") told(replaceWebGPU)(current, error); // such as a GPU that has gone away
  } finally {
    running = false;
    if (again) classify();
    else element("answer").setAttribute("aria-busy", false);
  }
}

async function replaceWebGPU({ source, head }, { message }) {
  await loadModel(source, head, "wasm");
  complain(`WebGPU does not run the model any more (${message}); from now on WebAssembly does.`);
}

function waiting() {
  return document.body.dataset.state === "failed" ? "There is no model" : "One moment …";
}

function show(result) {
  const probabilities = softmax(result.logits);
  const best = probabilities.indexOf(Math.max(...probabilities));
  verdict(model.classes[best], false);
  [...element("classes").children].forEach((item, i) => bar(item, probabilities[i]));
  flow.show(result, model.classes);
  about(result.milliseconds);
  if (settled && !again) say(`${model.classes[best]}, ${Math.round(100 * probabilities[best])} percent`);
}

function showEmpty() {
  const text = drawing.isBlank ? "Nothing drawn yet" : "An empty picture";
  verdict(text, true);
  for (const item of element("classes").children) bar(item, null);
  flow.show(null, model.classes);
  if (settled) say(text);
}

function bar(item, probability) {
  item.style.setProperty("--part", probability ?? 0);
  item.querySelector(".share").textContent = probability === null ? "" : `${(100 * probability).toFixed(1)}%`;
  if (probability === null) delete item.dataset.probability;
  else item.dataset.probability = probability;
}

function verdict(text, quiet) {
  element("verdict").textContent = text;
  element("verdict").classList.toggle("quiet", quiet);
}

function say(text) {
  if (element("status").textContent !== text) element("status").textContent = text;
}

function complain(text) {
  element("message").textContent = text;
  element("message").hidden = !text;
}

/** An action whose errors are shown. */
const told = (action) => (...values) => Promise.resolve().then(() => action(...values)).catch((error) => complain(error.message));

/** Show a picture or load a model, one after the other: what is slow must not take away what came of a later one. */
function open(file) {
  const done = opened.then(() => opening(file));
  opened = done.catch(() => {});
  return done;
}

async function opening(file) {
  if (!file) return;
  complain("");
  try {
    if (file.name.endsWith(".onnx")) await loadModel(new Uint8Array(await file.arrayBuffer()));
    else drawing.show(await decode(file));
  } catch (error) {
    throw new Error(`${file.name}: ${error.message}`);
  }
}

async function fetched(url) {
  const response = await fetch(url);
  const name = new URL(url, location.href).pathname.split("/").pop();
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return new File([await response.blob()], name);
}

async function showExamples() {
  const names = await (await fetched("examples/list.json")).text().then(JSON.parse);
  element("examples").replaceChildren(...names.map((name) => {
    const button = document.createElement("button");
    const image = Object.assign(new Image(), { src: `examples/${name}`, alt: `Example: ${name.split(/[-.]/)[0]}` });
    button.append(image);
    button.onclick = told(async () => open(await fetched(image.src)));
    return button;
  }));
}

for (const id of ["image", "model"]) {
  element(id).onchange = told(async ({ target }) => {
    const [file] = target.files;
    target.value = ""; // so that the same file can be chosen again
    await open(file);
  });
}
element("pen").oninput = ({ target }) => (drawing.width = Number(target.value));
element("clear").onclick = () => drawing.clear();
element("undo").onclick = () => drawing.undo();

addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("over"));
addEventListener("drop", told(async (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  if (!event.dataTransfer.files.length) throw new Error("Drop an image file: what was dropped is none.");
  await open(event.dataTransfer.files[0]);
}));
addEventListener("paste", told(async (event) => {
  if (event.clipboardData.files.length) await open(event.clipboardData.files[0]);
}));

if (location.protocol !== "file:") {
  const own = query.get("model");
  const url = (path) => new URL(path, location.href).href;
  startWorker();
  verdict("Nothing drawn yet", true);
  told(showExamples)();
  const loaded = told(() => (own ? loadModel(url(own)) : loadModel(url("model.onnx"), url("head.onnx"))))();
  if (query.has("image")) told(async () => open(await fetched(query.get("image"))))();
  // What it keeps is fetched after the model; without it the page needs a network.
  loaded.then(() => navigator.serviceWorker?.register("service-worker.js")).catch(() => {});
}
