// Memory of large tensors, handed on from one solve to the next.
//
// What a training step stores for its backward pass is too large for malloc to keep (it returns blocks over 32 MB to
// the system), and fresh pages cost as much time as a third of the forward solve that fills them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <mutex>
#include <utility>

// Since torch 2.11; absent from older ones, which then allocate as usual.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dimensions, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* tensor, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace nodeshape {

/// The latest block that was given back; any other is freed.
class Pages {
 public:
  /// Whether a block is worth keeping: malloc keeps smaller ones by itself, larger ones are much to hold on to.
  static bool suit(size_t bytes) { return bytes >= size_t(1) << 25 && bytes <= size_t(1) << 30; }

  /// At least `bytes`, which are more than half of the block; null if there is no memory.
  static void* take(size_t bytes, size_t* block) {
    {
      const std::lock_guard<std::mutex> lock(mutex());
      Spare& spare = kept();
      if (spare.data != nullptr && spare.bytes >= bytes && spare.bytes / 2 < bytes) {
        *block = spare.bytes;
        return std::exchange(spare.data, nullptr);
      }
    }
    *block = (bytes + 63) / 64 * 64;
    return std::aligned_alloc(64, *block);
  }

  static void give(void* data, size_t block) {
    {
      const std::lock_guard<std::mutex> lock(mutex());
      std::swap(kept().data, data);
      kept().bytes = block;
    }
    std::free(data);
  }

 private:
  struct Spare {
    void* data = nullptr;
    size_t bytes = 0;
  };
  // Never destroyed: tensors may outlive the library's statics.
  static Spare& kept() {
    static Spare* spare = new Spare;
    return *spare;
  }
  static std::mutex& mutex() {
    static std::mutex* mutex = new std::mutex;
    return *mutex;
  }
};

}  // namespace nodeshape
