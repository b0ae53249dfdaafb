// An image file as a classifier sees it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

/// Pixels [height, width, channels], rows from top to bottom.
struct Picture {
  int width, height, channels;
  std::vector<uint8_t> pixels;
};

/// Reads a PNG, JPEG or BMP file of at most 100 megapixels as a square of `size` pixels and 1 (grey) or 3 (RGB)
/// channels, as `python -m nodeshape.predict` does: turned upright as its EXIF tag says, laid on white where it is
/// transparent, scaled to fit with its aspect kept, centred on its border's median colour; 16-bit grey scaled to 8.
/// Throws std::runtime_error for a file that is no such image.
Picture read_picture(const std::string& path, int size, int channels);
