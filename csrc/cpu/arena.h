// Working memory of one thread: taken in pieces, given back all at once, and kept for the thread's next solve.
#pragma once

#include <new>

#include "simd.h"

namespace nodeshape::NODESHAPE_TARGET {

class Arena {
 public:
  Arena() : blocks_(spare().blocks), current_(blocks_) {
    spare().blocks = nullptr;
    if (current_ != nullptr) current_->used = 0;
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    int64_t bytes = 0;
    for (const Block* block = blocks_; block != nullptr; block = block->next) bytes += block->bytes;
    Chain& kept = spare();
    if (kept.blocks == nullptr && bytes <= kMostKept)
      kept.blocks = blocks_;
    else
      release_all(blocks_);
  }

  /// `count` uninitialised numbers, aligned to a cache line.
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = (count * int64_t(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    while (current_ != nullptr && current_->used + bytes > current_->bytes) {
      if (current_->next == nullptr) break;
      current_ = current_->next;
      current_->used = 0;
    }
    if (current_ == nullptr || current_->used + bytes > current_->bytes) append(bytes);
    T* piece = reinterpret_cast<T*>(reinterpret_cast<char*>(current_) + kAlignment + current_->used);
    current_->used += bytes;
    return piece;
  }

  /// As take(), set to zero.
  template <class T>
  T* zeros(int64_t count) {
    T* piece = take<T>(count);
    __builtin_memset(piece, 0, count * sizeof(T));
    return piece;
  }

  struct Mark {
    void* block;
    int64_t used;
  };
  Mark mark() const { return {current_, current_ == nullptr ? 0 : current_->used}; }

  /// Everything taken since `mark` is free again.
  void release(Mark mark) {
    current_ = mark.block == nullptr ? blocks_ : static_cast<Block*>(mark.block);
    if (current_ != nullptr) current_->used = mark.used;
  }

 private:
  static constexpr int64_t kAlignment = 64;
  static constexpr int64_t kSmallestBlock = 1 << 16;
  static constexpr int64_t kMostKept = 1 << 24;  // bytes a thread keeps: fresh pages cost more than a small solve

  struct Block {
    Block* next;
    int64_t bytes, used;
  };

  struct Chain {
    Block* blocks = nullptr;
    ~Chain() { release_all(blocks); }
  };

  static Chain& spare() {
    static thread_local Chain chain;
    return chain;
  }

  static void release_all(Block* blocks) {
    while (blocks != nullptr) {
      Block* next = blocks->next;
      ::operator delete(blocks, std::align_val_t{kAlignment});
      blocks = next;
    }
  }

  void append(int64_t bytes) {
    const int64_t room = bytes < kSmallestBlock ? kSmallestBlock : bytes;
    Block* block = static_cast<Block*>(::operator new(kAlignment + room, std::align_val_t{kAlignment}));
    *block = {nullptr, room, 0};
    if (current_ == nullptr)
      blocks_ = block;
    else
      current_->next = block;
    current_ = block;
  }

  Block* blocks_ = nullptr;
  Block* current_ = nullptr;
};

}  // namespace nodeshape::NODESHAPE_TARGET
