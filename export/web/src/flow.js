// What the ODE does to a picture: class probabilities and feature maps over t, with a slider and a play button.
import { softmax } from "./softmax.js";

const PLAY_SECONDS = 3;
const TICKS = [0.000001, 0.01, 0.5, 0.99, 0.999999];
const LIMIT = 14; // of the log-odds that the axis shows
const MARGIN = { left: 66, right: 12, top: 10, bottom: 22 };

export class Flow {
  #elements; #classes = []; #result = null; #probabilities = null; #odds = null; #largest = null; #playing = 0;

  /** `elements`: section, play, time, now, chart, figure, maps, count. */
  constructor(elements) {
    this.#elements = elements;
    elements.time.addEventListener("input", () => {
      this.#stop();
      this.#paint();
    });
    elements.play.addEventListener("click", () => this.#play());
    new ResizeObserver(() => this.#paint()).observe(elements.section);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#paint());
  }

  /** A result of the worker with `states`; null when there is nothing to show. */
  show(result, classes) {
    this.#result = result?.states ? result : null;
    this.#classes = classes;
    this.#elements.section.hidden = !this.#result;
    if (!this.#result) return this.#stop();
    const [moments, channels, height, width] = result.shape;
    this.#probabilities = result.logitsOverTime && Array.from({ length: moments }, (_, k) =>
      softmax(result.logitsOverTime.subarray(k * classes.length, (k + 1) * classes.length)));
    this.#odds = this.#probabilities?.map(logOdds);
    this.#largest = new Float32Array(channels);
    result.states.forEach((value, i) => {
      const channel = Math.floor(i / (height * width)) % channels;
      this.#largest[channel] = Math.max(this.#largest[channel], Math.abs(value));
    });
    this.#elements.figure.hidden = !this.#probabilities;
    this.#elements.count.textContent = channels;
    if (this.#probabilities) this.#describe();
    this.#paint();
  }

  /** The curves in words. */
  #describe() {
    const ends = [this.#probabilities[0], this.#probabilities.at(-1)].map((row) => row.map((value) => `${Math.round(100 * value)}%`));
    const words = this.#classes.map((name, i) => `${name} from ${ends[0][i]} to ${ends[1][i]}`);
    this.#elements.chart.setAttribute("aria-label", `Probability of each class from t = 0 to 1: ${words.join(", ")}`);
  }

  #play() {
    const { time } = this.#elements;
    if (this.#playing) return this.#stop();
    const start = performance.now() - (Number(time.value) < 1 ? Number(time.value) * PLAY_SECONDS * 1000 : 0);
    const frame = (now) => {
      const t = Math.min(1, Math.max(0, (now - start) / 1000 / PLAY_SECONDS));
      time.value = t;
      this.#paint(t);
      if (t < 1) this.#playing = requestAnimationFrame(frame);
      else this.#stop();
    };
    this.#playing = requestAnimationFrame(frame);
    this.#button(true);
  }

  #stop() {
    cancelAnimationFrame(this.#playing);
    this.#playing = 0;
    this.#button(false);
  }

  #button(playing) {
    const { play } = this.#elements;
    play.setAttribute("aria-label", playing ? "Pause" : "Play from t = 0 to 1");
    play.querySelector("path").setAttribute("d", playing ? "M5 4h4v12H5zM11 4h4v12h-4z" : "M6 4l10 6-10 6z");
  }

  #paint(t = Number(this.#elements.time.value)) {
    if (!this.#result) return;
    const moments = this.#result.shape[0];
    const before = Math.min(moments - 2, Math.floor(t * (moments - 1)));
    const part = t * (moments - 1) - before;
    this.#paintMaps(before, part);
    this.#say(t, this.#probabilities && between(this.#probabilities, before, part));
    if (this.#probabilities) this.#paintChart(t, between(this.#odds, before, part));
  }

  #say(t, probabilities) {
    const { now, time } = this.#elements;
    let text = `t = ${t.toFixed(2)}`;
    if (probabilities) {
      const best = probabilities.indexOf(Math.max(...probabilities));
      text += `: ${this.#classes[best]} ${(100 * probabilities[best]).toFixed(1)}%`;
    }
    now.textContent = text;
    time.setAttribute("aria-valuetext", text);
  }

  #paintChart(t, odds) {
    const { chart } = this.#elements;
    const [width, height] = [chart.clientWidth, chart.clientHeight];
    const x = (time) => MARGIN.left + time * (width - MARGIN.left - MARGIN.right);
    const y = (value) => height - MARGIN.bottom - (0.5 + value / LIMIT / 2) * (height - MARGIN.top - MARGIN.bottom);
    const last = this.#odds.length - 1;
    const parts = TICKS.map((value) => {
      const at = y(Math.log(value / (1 - value)));
      return `<line class="grid" x1="${x(0)}" x2="${x(1)}" y1="${at}" y2="${at}"/>` +
        `<text x="${MARGIN.left - 8}" y="${at + 4}" text-anchor="end">${Number((100 * value).toPrecision(6))}%</text>`;
    });
    parts.push(`<text x="${x(0)}" y="${height - 4}">t = 0</text><text x="${x(1)}" y="${height - 4}" text-anchor="end">1</text>`);
    parts.push(`<line class="now" x1="${x(t)}" x2="${x(t)}" y1="${y(-LIMIT)}" y2="${y(LIMIT)}"/>`);
    this.#classes.forEach((_, i) => {
      const line = this.#odds.map((row, k) => `${x(k / last).toFixed(1)} ${y(row[i]).toFixed(1)}`).join("L");
      parts.push(`<g style="--colour: var(--class-${i % 7})"><path d="M${line}"/><circle r="5" cx="${x(t)}" cy="${y(odds[i])}"/></g>`);
    });
    chart.innerHTML = parts.join("");
  }

  #paintMaps(before, part) {
    const { maps } = this.#elements;
    const { states, shape: [, channels, height, width] } = this.#result;
    const columns = Math.min(channels, maps.clientWidth < 480 ? 8 : 16);
    const [cellWidth, cellHeight] = [width + 1, height + 1];
    maps.width = columns * cellWidth - 1;
    maps.height = Math.ceil(channels / columns) * cellHeight - 1;
    const style = getComputedStyle(document.documentElement);
    const [zero, low, high] = ["--zero", "--low", "--high"].map((name) => rgb(style.getPropertyValue(name)));
    const picture = new ImageData(maps.width, maps.height);
    const size = channels * height * width;
    for (let i = 0; i < size; i++) {
      const [channel, row, column] = [Math.floor(i / (height * width)), Math.floor(i / width) % height, i % width];
      const from = states[before * size + i];
      const value = from + part * (states[(before + 1) * size + i] - from);
      const strength = Math.abs(value) / (this.#largest[channel] || 1);
      const colour = value < 0 ? low : high;
      const top = Math.floor(channel / columns) * cellHeight + row;
      const at = 4 * (top * maps.width + (channel % columns) * cellWidth + column);
      for (let k = 0; k < 3; k++) picture.data[at + k] = zero[k] + strength * (colour[k] - zero[k]);
      picture.data[at + 3] = 255;
    }
    maps.getContext("2d").putImageData(picture, 0, 0);
  }
}

/** Of each class against all others, within what the axis shows. */
function logOdds(probabilities) {
  return probabilities.map((value, i) => {
    const others = probabilities.reduce((sum, other, k) => (k === i ? sum : sum + other), 0);
    return Math.min(LIMIT, Math.max(-LIMIT, Math.log(value / others)));
  });
}

/** Row `before` of a table and the next, mixed. */
function between(rows, before, part) {
  return rows[before].map((value, i) => value + part * (rows[before + 1][i] - value));
}

function rgb(hex) {
  const digits = hex.trim().slice(1);
  return [0, 2, 4].map((i) => parseInt(digits.slice(i, i + 2), 16));
}
