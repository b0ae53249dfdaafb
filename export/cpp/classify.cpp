// Classify images with a model.ts that `python -m nodeshape.export` wrote:
// classify model.ts image.pgm ... Images are binary PGM (P5, grey) or PPM (P6,
// RGB) files of the model's size.

#include <torch/script.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// A PGM or PPM file as float32 [1, channels, height, width] in [0, 1].
torch::Tensor read_image(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, largest = 0;
  file >> magic >> width >> height >> largest;
  file.get();
  const int64_t channels = magic == "P5" ? 1 : 3;
  if (!file || (magic != "P5" && magic != "P6") || largest != 255 || width < 1 || height < 1 || width > 4096 ||
      height > 4096)
    throw std::runtime_error(path +
                             ": not a binary PGM or PPM image of 8 bits "
                             "and at most 4096 pixels per side");
  std::vector<uint8_t> pixels(static_cast<size_t>(width * height * channels));
  if (!file.read(reinterpret_cast<char*>(pixels.data()), static_cast<std::streamsize>(pixels.size())))
    throw std::runtime_error(path + ": truncated");
  auto image = torch::from_blob(pixels.data(), {1, height, width, channels}, torch::kUInt8);
  return image.permute({0, 3, 1, 2}).to(torch::kFloat32).contiguous() / 255;
}

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: classify MODEL.ts IMAGE...\n");
    return 2;
  }
  try {
    torch::InferenceMode inference;
    torch::jit::ExtraFilesMap extra{{"classes.txt", ""}};  // one name per line
    auto model = torch::jit::load(argv[1], torch::kCPU, extra);
    std::vector<std::string> classes;
    std::istringstream lines(extra["classes.txt"]);
    for (std::string line; std::getline(lines, line);) classes.push_back(line);
    for (int i = 2; i < argc; ++i) {
      const auto logits = model.forward({read_image(argv[i])}).toTensor();
      const auto probabilities = torch::softmax(logits, 1)[0];
      const auto best = probabilities.argmax().item<int64_t>();
      std::printf("%s  %s  %.4f\n", argv[i], classes.at(best).c_str(), probabilities[best].item<double>());
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", std::string(error.what()).substr(0, 300).c_str());
    return 2;
  }
}
