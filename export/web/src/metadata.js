// What an ONNX file says of itself, which onnxruntime-web does not tell: field 14 of its protobuf.

/** The metadata of a model as an object of strings. */
export function metadata(bytes) {
  const found = {};
  for (const [field, entry] of fields(bytes)) {
    if (field !== 14) continue;
    const [key, value] = [...fields(entry)].map(([, text]) => new TextDecoder().decode(text));
    found[key] = value;
  }
  return found;
}

/** The length-delimited fields of a protobuf message, as [number, bytes]. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let [value, scale, byte] = [0, 1];
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
