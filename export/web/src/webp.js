// How a WebP file wants to be turned, which not all browsers heed, as they do in JPEG and PNG.

/** What `setTransform` takes for each EXIF orientation but the first, given the width and height of the pixels. */
const TURNS = {
  2: (w) => [-1, 0, 0, 1, w, 0],
  3: (w, h) => [-1, 0, 0, -1, w, h],
  4: (w, h) => [1, 0, 0, -1, 0, h],
  5: () => [0, 1, 1, 0, 0, 0],
  6: (w, h) => [0, 1, -1, 0, h, 0],
  7: (w, h) => [0, -1, -1, 0, h, w],
  8: (w) => [0, -1, 1, 0, 0, w],
};

/** The orientation, 1 to 8, that the EXIF chunk of a WebP file asks for; 0 if these are not the bytes of one. */
export function webpOrientation(buffer) {
  const view = new DataView(buffer);
  const text = (at) => String.fromCharCode(...new Uint8Array(buffer, at, 4));
  if (buffer.byteLength < 16 || text(0) !== "RIFF" || text(8) !== "WEBP") return 0;
  for (let at = 12; at + 8 <= buffer.byteLength; ) {
    const size = view.getUint32(at + 4, true);
    if (text(at) === "EXIF") return orientation(new DataView(buffer, at + 8, Math.min(size, buffer.byteLength - at - 8)));
    at += 8 + size + (size % 2);
  }
  return 1;
}

/** Of EXIF data: entry 0x0112 of the first directory of a TIFF header. */
function orientation(view) {
  try {
    const start = view.getUint32(0) === 0x45786966 ? 6 : 0; // "Exif", and two zeros
    const little = view.getUint16(start) === 0x4949;
    const directory = start + view.getUint32(start + 4, little);
    for (let i = 0; i < view.getUint16(directory, little); i++) {
      const entry = directory + 2 + 12 * i;
      if (view.getUint16(entry, little) !== 0x0112) continue;
      const value = view.getUint16(entry + 8, little);
      return value >= 1 && value <= 8 ? value : 1;
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // the data ends early
  }
  return 1;
}

/** Width, height and transform of a picture of `width` × `height` once it is turned. */
export function turned(orientation, width, height) {
  const size = orientation >= 5 ? [height, width] : [width, height];
  return [...size, TURNS[orientation]?.(width, height) ?? [1, 0, 0, 1, 0, 0]];
}
