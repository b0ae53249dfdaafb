// Working memory of one team: shared memory while it lasts, if the team is a single block, then a slice of global
// memory.
//
// Every thread of the team takes the same pieces in the same order. Made without memory, an arena only measures: the
// host runs the constructors of a solve through one to learn how much global memory a team needs.
#pragma once

#include "block.cuh"

namespace nodeshape::cuda {

class Arena {
 public:
  NODESHAPE_FUNCTION Arena(char* shared, int64_t shared_bytes, char* global)
      : shared_(shared), shared_bytes_(shared_bytes), global_(global) {}
  /// One that measures.
  NODESHAPE_FUNCTION explicit Arena(int64_t shared_bytes) : Arena(nullptr, shared_bytes, nullptr) {}

  /// `count` uninitialised elements, aligned to 16 bytes.
  template <class T>
  NODESHAPE_FUNCTION T* take(int64_t count) {
    const int64_t bytes = (count * int64_t(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    char* piece;
    if (shared_used_ + bytes <= shared_bytes_) {
      piece = shared_ == nullptr ? nullptr : shared_ + shared_used_;
      shared_used_ += bytes;
    } else {
      piece = global_ == nullptr ? nullptr : global_ + global_used_;
      global_used_ += bytes;
    }
    return reinterpret_cast<T*>(piece);
  }

  /// As take(), set to zero.
  template <class T>
  NODESHAPE_FUNCTION T* zeros(int64_t count) {
    T* piece = take<T>(count);
    if (piece != nullptr) spread(count, [=](int64_t i) { piece[i] = 0; });
    return piece;
  }

  NODESHAPE_FUNCTION int64_t shared_bytes() const { return shared_used_; }
  NODESHAPE_FUNCTION int64_t global_bytes() const { return global_used_; }

 private:
  static constexpr int64_t kAlignment = 16;

  char* shared_;
  int64_t shared_bytes_;
  char* global_;
  int64_t shared_used_ = 0, global_used_ = 0;
};

}  // namespace nodeshape::cuda
