#include "picture.h"

#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_BMP
#define STBI_ONLY_JPEG
#define STBI_ONLY_PNG
#include <stb_image.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>

namespace {

using Bytes = std::vector<uint8_t>;

constexpr int64_t kMostPixels = 100'000'000;

// ---- EXIF ------------------------------------------------------------------------------------------------------

/// A number of `count` bytes at `at`; 0 past the end.
uint32_t number(const Bytes& bytes, size_t at, int count, bool little) {
  if (at + count > bytes.size()) return 0;
  uint32_t value = 0;
  for (int i = 0; i < count; ++i) value |= uint32_t(bytes[at + i]) << 8 * (little ? i : count - 1 - i);
  return value;
}

/// The tag 0x0112 of the first directory of a TIFF header at `at`: 1 to 8, 1 if there is none.
int tiff_orientation(const Bytes& bytes, size_t at) {
  const bool little = number(bytes, at, 2, false) == 0x4949;
  const size_t directory = at + number(bytes, at + 4, 4, little);
  const uint32_t entries = number(bytes, directory, 2, little);
  for (uint32_t i = 0; i < entries; ++i) {
    const size_t entry = directory + 2 + 12 * size_t(i);
    if (number(bytes, entry, 2, little) != 0x0112) continue;
    const int value = int(number(bytes, entry + 8, 2, little));
    return value >= 1 && value <= 8 ? value : 1;
  }
  return 1;
}

/// Of a JPEG's APP1 segment, or of a PNG's chunk eXIf.
int orientation(const Bytes& bytes) {
  if (number(bytes, 0, 2, false) == 0xffd8) {
    for (size_t at = 2; number(bytes, at, 1, false) == 0xff && number(bytes, at + 1, 1, false) != 0xda;
         at += 2 + number(bytes, at + 2, 2, false)) {
      const bool exif = number(bytes, at + 1, 1, false) == 0xe1 && number(bytes, at + 4, 4, false) == 0x45786966;
      if (exif) return tiff_orientation(bytes, at + 10);
    }
  } else if (number(bytes, 0, 4, false) == 0x89504e47) {
    for (size_t at = 8; at + 8 < bytes.size(); at += 12 + size_t(number(bytes, at, 4, false)))
      if (number(bytes, at + 4, 4, false) == 0x65584966) return tiff_orientation(bytes, at + 8);
  }
  return 1;
}

/// What the orientation says of how the camera was held, undone.
Picture upright(const Picture& image, int orientation) {
  if (orientation == 1) return image;
  const bool turned = orientation >= 5;
  Picture out{turned ? image.height : image.width, turned ? image.width : image.height, image.channels, {}};
  out.pixels.resize(image.pixels.size());
  const bool mirrored = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool flipped = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  for (int y = 0; y < out.height; ++y)
    for (int x = 0; x < out.width; ++x) {
      int from_x = turned ? y : x, from_y = turned ? x : y;
      if (mirrored) from_x = image.width - 1 - from_x;
      if (flipped) from_y = image.height - 1 - from_y;
      const size_t to = (size_t(y) * out.width + x) * image.channels;
      const size_t from = (size_t(from_y) * image.width + from_x) * image.channels;
      std::copy_n(&image.pixels[from], image.channels, &out.pixels[to]);
    }
  return out;
}

// ---- colours ---------------------------------------------------------------------------------------------------

/// Without alpha, on white; in integers as Pillow's alpha_composite.
Picture opaque(const Picture& image) {
  if (image.channels == 1 || image.channels == 3) return image;
  const int colours = image.channels - 1;
  Picture out{image.width, image.height, colours, Bytes(image.pixels.size() / image.channels * colours)};
  for (size_t pixel = 0; pixel * colours < out.pixels.size(); ++pixel) {
    const uint8_t* from = &image.pixels[pixel * image.channels];
    const uint32_t part = from[colours] * 128u;
    for (int c = 0; c < colours; ++c) {
      const uint32_t sum = from[c] * part + 255 * (255 * 128 - part) + (0x80 << 7);
      out.pixels[pixel * colours + c] = uint8_t(((sum >> 8) + sum) >> 8 >> 7);
    }
  }
  return out;
}

Picture with_channels(const Picture& image, int channels) {
  if (image.channels == channels) return image;
  Picture out{image.width, image.height, channels, {}};
  for (size_t i = 0; i < image.pixels.size(); i += image.channels) {
    const uint8_t* p = &image.pixels[i];
    if (channels == 3)
      out.pixels.insert(out.pixels.end(), 3, p[0]);
    else  // ITU-R 601-2
      out.pixels.push_back(uint8_t((p[0] * 19595u + p[1] * 38470u + p[2] * 7471u + 0x8000u) >> 16));
  }
  return out;
}

// ---- sizes -----------------------------------------------------------------------------------------------------

/// Along rows, by a triangle as wide as a new pixel, in fixed point: as Pillow's resize with BILINEAR.
Picture resized_rows(const Picture& image, int width) {
  constexpr int kBits = 32 - 8 - 2;
  if (width == image.width) return image;
  Picture out{width, image.height, image.channels, Bytes(size_t(width) * image.height * image.channels)};
  const double scale = double(image.width) / width, wide = std::max(scale, 1.0);
  std::vector<double> parts;
  std::vector<int> weights;
  for (int x = 0; x < width; ++x) {
    const double centre = (x + 0.5) * scale;
    const int first = std::max(0, int(centre - wide + 0.5)), end = std::min(image.width, int(centre + wide + 0.5));
    parts.clear();
    double sum = 0;
    for (int i = first; i < end; ++i) {
      parts.push_back(std::max(0.0, 1 - std::abs((i - centre + 0.5) * (1 / wide))));
      sum += parts.back();
    }
    weights.clear();
    for (double part : parts) weights.push_back(int(0.5 + part / sum * (1 << kBits)));
    for (int y = 0; y < image.height; ++y)
      for (int c = 0; c < image.channels; ++c) {
        int value = 1 << (kBits - 1);
        for (int i = first; i < end; ++i)
          value += image.pixels[(size_t(y) * image.width + i) * image.channels + c] * weights[i - first];
        out.pixels[(size_t(y) * width + x) * image.channels + c] = uint8_t(std::clamp(value >> kBits, 0, 255));
      }
  }
  return out;
}

/// Rows as columns.
Picture transposed(const Picture& image) { return upright(image, 5); }

int median(Bytes values) {
  std::sort(values.begin(), values.end());
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
}

Picture letterboxed(const Picture& image, int size) {
  const double scale = double(size) / std::max(image.width, image.height);
  const auto scaled = [&](int side) { return std::max(1, int(std::nearbyint(side * scale))); };
  const int width = scaled(image.width), height = scaled(image.height), channels = image.channels;
  const auto resized_columns = [&](const Picture& x) { return transposed(resized_rows(transposed(x), height)); };
  // As Pillow does from version 13 on.
  const bool columns_first = image.height > height && image.height - height > 2 * (image.width - width);
  const Picture small =
      columns_first ? resized_rows(resized_columns(image), width) : resized_columns(resized_rows(image, width));
  if (width == height) return small;

  Picture square{size, size, channels, Bytes(size_t(size) * size * channels)};
  const auto pixel = [&](int y, int x, int c) { return small.pixels[(size_t(y) * width + x) * channels + c]; };
  for (int c = 0; c < channels; ++c) {
    Bytes border;
    for (int x = 0; x < width; ++x)
      for (int y : {0, height - 1}) border.push_back(pixel(y, x, c));
    for (int y = 0; y < height; ++y)
      for (int x : {0, width - 1}) border.push_back(pixel(y, x, c));
    const uint8_t background = uint8_t(median(std::move(border)));
    for (size_t i = c; i < square.pixels.size(); i += channels) square.pixels[i] = background;
  }
  const int left = (size - width) / 2, top = (size - height) / 2;
  for (int y = 0; y < height; ++y)
    std::copy_n(&small.pixels[size_t(y) * width * channels], size_t(width) * channels,
                &square.pixels[(size_t(top + y) * size + left) * channels]);
  return square;
}

// ---- files -----------------------------------------------------------------------------------------------------

struct Free {
  void operator()(void* pixels) const { stbi_image_free(pixels); }
};

Picture decoded(const Bytes& file, const std::string& path) {
  const int length = int(file.size());
  int width, height, channels;
  if (!stbi_info_from_memory(file.data(), length, &width, &height, &channels))
    throw std::runtime_error(path + ": not a PNG, JPEG or BMP image");
  if (int64_t(width) * height > kMostPixels) throw std::runtime_error(path + ": more than 100 megapixels");
  // Of 16 bits, the upper 8; grey is rounded.
  const bool deep = stbi_is_16_bit_from_memory(file.data(), length) && channels == 1;
  void* read = deep ? static_cast<void*>(stbi_load_16_from_memory(file.data(), length, &width, &height, &channels, 1))
                    : stbi_load_from_memory(file.data(), length, &width, &height, &channels, 0);
  const std::unique_ptr<void, Free> pixels(read);
  if (!pixels) throw std::runtime_error(path + ": damaged image: " + stbi_failure_reason());
  const size_t count = size_t(width) * height * channels;
  Picture image{width, height, channels, Bytes(count)};
  if (!deep) {
    std::memcpy(image.pixels.data(), pixels.get(), count);
  } else {
    const auto* values = static_cast<const uint16_t*>(pixels.get());
    // Cameras write 12-bit values into 16-bit files.
    const uint32_t white = *std::max_element(values, values + count) > 4095 ? 65535 : 4095;
    for (size_t i = 0; i < count; ++i) image.pixels[i] = uint8_t((values[i] * 255u + white / 2) / white);
  }
  return image;
}

}  // namespace

Picture read_picture(const std::string& path, int size, int channels) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error(path + ": no such file");
  const Bytes file{std::istreambuf_iterator<char>(stream), {}};
  if (file.size() > size_t(1) << 30) throw std::runtime_error(path + ": more than a gigabyte");
  const Picture image = upright(decoded(file, path), orientation(file));
  return letterboxed(with_channels(opaque(image), channels), size);
}
