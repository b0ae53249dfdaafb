// The paper: strokes by pointer or keyboard, or a picture. It calls `changed(settled)` whenever something is new on it.

const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const [STEP, SMALL_STEP] = [16, 4];

export class Drawing {
  #canvas; #cursor; #changed; #pen;
  #strokes = []; // each { width, points: [[x, y], ...] }
  #image = null; // ImageData that is shown instead
  #pointer = null; // the id of the pointer that draws
  #at = [256, 256]; // of the keyboard's pen
  #down = false;
  width = 18;

  constructor(canvas, cursor, changed) {
    this.#canvas = canvas;
    this.#cursor = cursor;
    this.#changed = changed;
    this.#pen = canvas.getContext("2d", { willReadFrequently: true });
    canvas.addEventListener("pointerdown", (event) => this.#press(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => this.#lift(event));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#hideCursor());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#refresh(true));
    this.#paint();
  }

  get isBlank() {
    return !this.#image && !this.#strokes.length;
  }

  /** What is classified: ImageData of the picture, or of the paper. */
  get image() {
    return this.#image ?? this.#pen.getImageData(0, 0, this.#canvas.width, this.#canvas.height);
  }

  show(image) {
    this.#strokes = [];
    this.#image = image;
    this.#refresh(true);
  }

  clear() {
    this.show(null);
  }

  undo() {
    if (this.#image) return this.clear();
    this.#strokes.pop();
    this.#refresh(true);
  }

  #refresh(settled) {
    this.#paint();
    this.#changed(settled);
  }

  #place({ clientX, clientY }) {
    const box = this.#canvas.getBoundingClientRect();
    return [((clientX - box.left) / box.width) * this.#canvas.width, ((clientY - box.top) / box.height) * this.#canvas.height];
  }

  #begin(point) {
    this.#image = null;
    this.#strokes.push({ width: this.width, points: [point] });
  }

  #press(event) {
    if (event.button !== 0 || this.#pointer !== null) return;
    this.#hideCursor();
    this.#pointer = event.pointerId;
    this.#canvas.setPointerCapture(event.pointerId);
    this.#begin(this.#place(event));
    this.#refresh(false);
  }

  #move(event) {
    if (event.pointerId !== this.#pointer) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const each of events.length ? events : [event]) this.#strokes.at(-1).points.push(this.#place(each));
    this.#refresh(false);
  }

  #lift(event) {
    if (event.pointerId !== this.#pointer) return;
    this.#pointer = null;
    this.#changed(true);
  }

  #key(event) {
    if ((event.ctrlKey || event.metaKey) && event.key === "z") {
      this.undo();
    } else if (event.ctrlKey || event.metaKey || event.altKey) {
      return;
    } else if (event.key === " ") {
      this.#down = !this.#down;
      if (this.#down) this.#begin([...this.#at]);
      this.#refresh(!this.#down);
    } else if (event.key in KEYS) {
      const step = event.shiftKey ? SMALL_STEP : STEP;
      const limit = this.#canvas.width;
      this.#at = this.#at.map((x, axis) => Math.min(limit, Math.max(0, x + step * KEYS[event.key][axis])));
      if (this.#down) {
        this.#strokes.at(-1).points.push([...this.#at]);
        this.#refresh(false);
      }
    } else return;
    event.preventDefault();
    const [left, top] = this.#at.map((x) => `${(100 * x) / this.#canvas.width}%`);
    Object.assign(this.#cursor.style, { left, top });
    this.#cursor.classList.toggle("down", this.#down);
    this.#cursor.hidden = false;
  }

  #hideCursor() {
    if (this.#down) this.#changed(true);
    this.#down = false;
    this.#cursor.hidden = true;
  }

  #paint() {
    const { width, height } = this.#canvas;
    const pen = this.#pen;
    const style = getComputedStyle(document.documentElement);
    pen.fillStyle = style.getPropertyValue("--paper");
    pen.fillRect(0, 0, width, height);
    if (this.#image) return this.#paintImage();
    Object.assign(pen, { lineCap: "round", lineJoin: "round", strokeStyle: style.getPropertyValue("--ink") });
    for (const stroke of this.#strokes) {
      pen.lineWidth = stroke.width;
      pen.beginPath();
      pen.moveTo(...stroke.points[0]);
      for (const point of stroke.points) pen.lineTo(...point);
      pen.stroke();
    }
  }

  #paintImage() {
    const { width, height } = this.#image;
    const copy = new OffscreenCanvas(width, height);
    copy.getContext("2d").putImageData(this.#image, 0, 0);
    const scale = Math.min(this.#canvas.width / width, this.#canvas.height / height);
    this.#pen.imageSmoothingEnabled = scale < 1;
    this.#pen.imageSmoothingQuality = "high";
    const [left, top] = [(this.#canvas.width - width * scale) / 2, (this.#canvas.height - height * scale) / 2];
    this.#pen.drawImage(copy, left, top, width * scale, height * scale);
  }
}
