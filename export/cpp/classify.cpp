// Classify images with a model that `python -m nodeshape.export` wrote: classify MODEL IMAGE...
// MODEL is model.ts; or, with --native, model.fused.ts or model.fused.pt2, beside which libnodeshape_cpu.so lies.

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <cstdio>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "picture.h"

namespace fs = std::filesystem;

struct Model {
  std::function<torch::Tensor(torch::Tensor)> logits;  // of images [batch, channels, size, size]
  std::vector<std::string> classes;
  int size, channels;
  bool takes_bytes;  // uint8, rather than float32 in [0, 1]
};

/// The ops of native files.
void load_library(const fs::path& path) {
  if (dlopen(fs::absolute(path).c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());
}

Model read_model(const fs::path& path) {
  if (!fs::is_regular_file(path)) throw std::runtime_error(path.string() + ": no such file");
  if (path.stem().extension() == ".fused") load_library(path.parent_path() / "libnodeshape_cpu.so");
  Model model;
  std::map<std::string, std::string> texts;
  if (path.extension() == ".pt2") {
    const auto loader = std::make_shared<torch::inductor::AOTIModelPackageLoader>(path.string());
    for (const auto& [name, text] : loader->get_metadata()) texts[name] = text;
    model.logits = [loader](torch::Tensor images) { return loader->run({images})[0]; };
  } else {
    torch::jit::ExtraFilesMap extra;
    for (const char* name : {"classes.txt", "image_size", "channels", "input"}) extra[name] = "";
    auto module = torch::jit::load(path.string(), torch::kCPU, extra);
    for (const auto& [name, text] : extra) texts[name] = text;
    model.logits = [module](torch::Tensor images) mutable {
      const auto out = module.forward({images});
      return out.isTuple() ? out.toTuple()->elements()[0].toTensor() : out.toTensor();
    };
  }
  std::istringstream lines(texts["classes.txt"]);  // one name per line
  for (std::string line; std::getline(lines, line);) model.classes.push_back(line);
  if (texts["image_size"].empty()) throw std::runtime_error(path.string() + ": not written by nodeshape.export");
  model.size = std::stoi(texts["image_size"]);
  model.channels = texts["channels"] == "rgb" ? 3 : 1;
  model.takes_bytes = texts["input"] == "uint8";
  return model;
}

torch::Tensor as_tensor(const Picture& picture, bool bytes) {
  const auto pixels = torch::from_blob(const_cast<uint8_t*>(picture.pixels.data()),
                                       {1, picture.height, picture.width, picture.channels}, torch::kUInt8);
  const auto planes = pixels.permute({0, 3, 1, 2}).contiguous();
  return bytes ? planes : planes.to(torch::kFloat32) / 255;
}

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: classify MODEL IMAGE...\n");
    return 2;
  }
  int failed = 0;
  try {
    const torch::InferenceMode inference;
    const Model model = read_model(argv[1]);
    for (int i = 2; i < argc; ++i) {
      Picture picture;
      try {
        picture = read_picture(argv[i], model.size, model.channels);
      } catch (const std::runtime_error& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        failed = 2;
        continue;
      }
      const auto probabilities = torch::softmax(model.logits(as_tensor(picture, model.takes_bytes)), 1)[0];
      const auto best = probabilities.argmax().item<int64_t>();
      std::printf("%s  %s  %.4f\n", argv[i], model.classes.at(best).c_str(), probabilities[best].item<double>());
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", std::string(error.what()).substr(0, 300).c_str());
    return 2;
  }
  return failed;
}
