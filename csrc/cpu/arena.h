// Working memory of one thread: taken in pieces, given back all at once, and kept for the thread's next solve.
#pragma once

#include <new>

#include "simd.h"

namespace nodeshape::NODESHAPE_TARGET {

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    while (blocks_ != nullptr) {
      Block* next = blocks_->next;
      spare().give(blocks_);
      blocks_ = next;
    }
  }

  /// `count` uninitialised elements, aligned to a cache line.
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = count > kMost / int64_t(sizeof(T))
                              ? kMost  // which operator new refuses
                              : (count * int64_t(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
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
  static constexpr int64_t kMost = int64_t(1) << 62;  // bytes
  static constexpr int64_t kSmallestBlock = 1 << 16;
  static constexpr int64_t kMostKept = 1 << 24;  // bytes a thread keeps: fresh pages cost more than a small solve

  struct Block {
    Block* next;
    int64_t bytes, used;
  };

  /// Blocks of this thread that no arena uses.
  struct Spare {
    Block* blocks = nullptr;
    int64_t kept = 0;

    ~Spare() {
      while (blocks != nullptr) destroy(take(0));
    }

    /// A block of at least `bytes`, or null.
    Block* take(int64_t bytes) {
      for (Block** link = &blocks; *link != nullptr; link = &(*link)->next)
        if ((*link)->bytes >= bytes) {
          Block* block = *link;
          *link = block->next;
          kept -= block->bytes;
          return block;
        }
      return nullptr;
    }

    void give(Block* block) {
      if (kept + block->bytes > kMostKept) return destroy(block);
      block->next = blocks;
      blocks = block;
      kept += block->bytes;
    }
  };

  static Spare& spare() {
    static thread_local Spare blocks;
    return blocks;
  }

  static void destroy(Block* block) { ::operator delete(block, std::align_val_t{kAlignment}); }

  void append(int64_t bytes) {
    const int64_t room = bytes < kSmallestBlock ? kSmallestBlock : bytes;
    Block* block = spare().take(room);
    if (block == nullptr) {
      block = static_cast<Block*>(::operator new(kAlignment + room, std::align_val_t{kAlignment}));
      block->bytes = room;
    }
    block->next = nullptr;
    block->used = 0;
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
