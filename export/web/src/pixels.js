// A picture as the model takes it: byte for byte what nodeshape/_data/images.py makes of the same pixels.

import { turned, webpOrientation } from "./webp.js";

/** Pictures of more are refused, as by nodeshape. */
export const MAX_PIXELS = 100_000_000;
/** A picture whose values differ by less than this, of 255, has nothing on it. */
export const CONTRAST = 8;

/** The pixels of an image file, upright as its EXIF tag says, on white where it is transparent: ImageData. */
export async function decode(blob) {
  if (!blob.size) throw new Error("an empty file");
  const bytes = await blob.arrayBuffer();
  const orientation = webpOrientation(bytes);
  let bitmap;
  try {
    const imageOrientation = orientation ? "none" : "from-image";
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", imageOrientation });
  } catch {
    throw new Error("not an image that this browser can read");
  }
  const [width, height, transform] = turned(orientation, bitmap.width, bitmap.height);
  if (width * height > MAX_PIXELS) {
    throw new Error(`an image of more than ${MAX_PIXELS / 1e6} megapixels (${width} × ${height})`);
  }
  const pen = new OffscreenCanvas(width, height).getContext("2d");
  pen.fillStyle = "white";
  pen.fillRect(0, 0, width, height);
  pen.setTransform(...transform);
  pen.drawImage(bitmap, 0, 0);
  bitmap.close();
  const image = pen.getImageData(0, 0, width, height);
  if (isGreyOf16Bits(bytes)) brighten(image);
  return image;
}

/** Whether a file is a PNG of 16-bit grey values. */
function isGreyOf16Bits(bytes) {
  const head = new DataView(bytes);
  return head.byteLength > 26 && head.getUint32(0) === 0x89504e47 && head.getUint8(24) === 16 && head.getUint8(25) === 0;
}

/** Cameras write 12-bit values into 16-bit files, of which a browser gives the upper 8 bits: black, but for these 4. */
function brighten({ data }) {
  let highest = 0;
  for (let i = 0; i < data.length; i += 4) highest = Math.max(highest, data[i]);
  if (highest > 15) return;
  for (let i = 0; i < data.length; i++) if (i % 4 < 3) data[i] *= 17;
}

/**
 * ImageData scaled to fit a square of `size` pixels, aspect kept, centred on the median colour of its border.
 * Returns `channels` (1, grey, or 3) planes of bytes, one after the other.
 */
export function square(image, size, channels) {
  const scale = size / Math.max(image.width, image.height);
  const [width, height] = [image.width, image.height].map((side) => Math.max(1, halfToEven(side * scale)));
  const bytes = new Uint8Array(channels * size * size);
  for (let channel = 0; channel < channels; channel++) {
    const plane = resize(channels === 1 ? grey(image) : only(image, channel), image.width, image.height, width, height);
    const target = bytes.subarray(channel * size * size, (channel + 1) * size * size);
    if (width !== height) target.fill(borderMedian(plane, width, height));
    const [left, top] = [Math.floor((size - width) / 2), Math.floor((size - height) / 2)];
    for (let y = 0; y < height; y++) target.set(plane.subarray(y * width, (y + 1) * width), (top + y) * size + left);
  }
  return bytes;
}

/** Whether a picture, of `channels` planes, has nothing on it: no plane has contrast. */
export function isEmpty(bytes, channels) {
  const area = bytes.length / channels;
  for (let channel = 0; channel < channels; channel++) {
    let [low, high] = [255, 0];
    for (const value of bytes.subarray(channel * area, (channel + 1) * area)) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
    if (high - low >= CONTRAST) return false;
  }
  return true;
}

function grey({ data }) {
  const plane = new Uint8Array(data.length / 4);
  for (let i = 0; i < plane.length; i++) {
    plane[i] = (data[4 * i] * 19595 + data[4 * i + 1] * 38470 + data[4 * i + 2] * 7471 + 0x8000) >> 16;
  }
  return plane;
}

function only({ data }, channel) {
  const plane = new Uint8Array(data.length / 4);
  for (let i = 0; i < plane.length; i++) plane[i] = data[4 * i + channel];
  return plane;
}

/** Pillow's bilinear resize: weights over all pixels that an output pixel covers, in fixed point, rows first. */
function resize(plane, width, height, newWidth, newHeight) {
  if (newWidth !== width) plane = resizeRows(plane, width, height, newWidth);
  if (newHeight !== height) {
    plane = transpose(resizeRows(transpose(plane, newWidth, height), height, newWidth, newHeight), newHeight, newWidth);
  }
  return plane;
}

const PRECISION = 22; // bits

function resizeRows(plane, width, height, newWidth) {
  const result = new Uint8Array(newWidth * height);
  const scale = width / newWidth;
  const support = Math.max(scale, 1);
  for (let x = 0; x < newWidth; x++) {
    const centre = (x + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const last = Math.min(width, Math.trunc(centre + support + 0.5));
    const weights = new Float64Array(last - first);
    let sum = 0;
    for (let i = 0; i < weights.length; i++) {
      sum += weights[i] = Math.max(0, 1 - Math.abs((i + first - centre + 0.5) * (1 / support)));
    }
    for (let i = 0; i < weights.length; i++) weights[i] = Math.floor((weights[i] / sum) * 2 ** PRECISION + 0.5);
    for (let y = 0; y < height; y++) {
      let value = 2 ** (PRECISION - 1);
      for (let i = 0; i < weights.length; i++) value += plane[y * width + first + i] * weights[i];
      result[y * newWidth + x] = Math.min(255, value / 2 ** PRECISION);
    }
  }
  return result;
}

function transpose(plane, width, height) {
  const result = new Uint8Array(plane.length);
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) result[x * height + y] = plane[y * width + x];
  return result;
}

function borderMedian(plane, width, height) {
  const border = [...plane.subarray(0, width), ...plane.subarray((height - 1) * width)];
  for (let y = 0; y < height; y++) border.push(plane[y * width], plane[(y + 1) * width - 1]);
  border.sort((a, b) => a - b);
  const middle = border.length / 2; // an even number
  return Math.trunc((border[middle - 1] + border[middle]) / 2);
}

/** The nearest whole number; of two, the even one, as Python rounds. */
function halfToEven(x) {
  const below = Math.floor(x);
  if (x - below !== 0.5) return Math.round(x);
  return below % 2 ? below + 1 : below;
}
