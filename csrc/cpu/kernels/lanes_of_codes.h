// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: codes of W rows as vectors along the rows, step by step of k, for products of a few
// rows and for packing. Codes move into lanes as words of four bytes, which costs a fraction of moving floats, and
// become float32 there. Formats and shapes that no reader is for are decoded by codes.h.

#include "code_readers.h"

#include "scales_of_codes.h"

// What is read after a unit of the codes at k: a line of each row is asked for once, evenly, as many at once would wait
// for each other.
template <class Layout, int R>
struct AskedRows {
  static constexpr FormatInfo kInfo = info_of(Layout::kFormat);
  static constexpr int64_t W = Vec<float>::kLanes, kUnit = Layout::Read::kUnit;
  static constexpr int64_t kAsked = divide_up(W * kUnit * kInfo.block_bytes, kInfo.block * 64);  // lines of a unit

  const ScaledRows<Layout>* rows;
  int64_t row_bytes, later, turn, asked = 0;
  FFN_FN AskedRows(const ScaledRows<Layout>* rows, const Codes& c, int64_t k)
      : rows(rows),
        row_bytes(c.row_bytes),
        later(k * kInfo.block_bytes / kInfo.block + kStreamBytes),
        turn(k / kUnit * kAsked) {}
  FFN_FN void until(int64_t part, int64_t parts) {
    for (; asked * parts < part * kAsked; ++asked) {
      const int64_t at = later + (kAsked > W ? asked / W * 64 : 0);
      FFN_UNROLL
      for (int r = 0; r < R; ++r)
        prefetch(rows[r].row[(turn + asked) % W] + at + (at < row_bytes ? 0 : rows[r].ahead - row_bytes));
    }
  }
};

// What reads a format: `Reader` of codes, or a part of one.
template <Format kFormat_, class Reader, Affine kAffine_ = Affine::kScale>
struct CodeLayout {
  using Read = Reader;
  static constexpr Format kFormat = kFormat_;
  static constexpr bool kInBlocks = info_of(kFormat_).tensors == 1;  // scales, with their codes
  static constexpr Affine kAffine = kAffine_;
};

// Calls f(layout) where sums of rows of K such codes may be kept in units of their scales.
template <class F>
FFN_FN void with_powers_layout(const Codes& c, int64_t K, const F& f) {
  if constexpr (ReadNibbles<true, false>::kUnit % kSumBlock == 0) {
    if (c.format == Format::kMxfp4 && c.scale_type == ScaleType::kE8M0 && c.block_cols == 32 && K % 32 == 0)
      return f(CodeLayout<Format::kMxfp4, ReadNibbles<true, false>, Affine::kPower>{});
    if (c.format == Format::kGgufMxfp4)
      return f(CodeLayout<Format::kGgufMxfp4, ReadBlocks4<true, false, 4>, Affine::kPower>{});
  }
}

// Calls f(layout) where a reader is for rows of K such codes.
template <class F>
FFN_FN bool with_layout(const Codes& c, int64_t K, const F& f) {
  // Scales of whole units: the group's end is a multiple of a unit, or the row's.
  const auto whole = [&](int64_t unit) { return K % unit == 0 && (c.block_cols % unit == 0 || c.block_cols >= K); };
  const auto read = [&](bool fits, auto layout) {
    if (fits) f(layout);
    return fits;
  };
  constexpr Affine kPowers = kAddsExponents ? Affine::kExponent : Affine::kScale;  // of two
  switch (c.format) {
    case Format::kMxfp4:
      if (c.scale_type == ScaleType::kE8M0)
        return read(whole(32), CodeLayout<Format::kMxfp4, ReadNibbles<true, kAddsExponents>, kPowers>{});
      return read(whole(32), CodeLayout<Format::kMxfp4, ReadNibbles<true, false>>{});
    case Format::kNvfp4:
      return read(K % 32 == 0 && c.block_cols == 16, CodeLayout<Format::kNvfp4, ReadNibbles<true, false>>{});
    case Format::kInt4:
      return read(whole(32), CodeLayout<Format::kInt4, ReadNibbles<false, false>>{});
    case Format::kUint4:
      return read(whole(32), CodeLayout<Format::kUint4, ReadNibbles<false, false>, Affine::kZero>{});
    case Format::kInt8:
      return read(whole(16), CodeLayout<Format::kInt8, ReadInt8>{});
    case Format::kFp8:
      return read(whole(16), CodeLayout<Format::kFp8, ReadFp8>{});
    case Format::kQ8_0:
      return read(true, CodeLayout<Format::kQ8_0, ReadQ80>{});
    case Format::kQ4_0:
      return read(true, CodeLayout<Format::kQ4_0, ReadBlocks4<false, false>>{});
    case Format::kGgufMxfp4:
      return read(true, CodeLayout<Format::kGgufMxfp4, ReadBlocks4<true, kAddsExponents>, kPowers>{});
    case Format::kQ4_K:
      return read(true, CodeLayout<Format::kQ4_K, ReadQ4K<false>, Affine::kMinimum>{});
    case Format::kQ5_K:
      return read(true, CodeLayout<Format::kQ5_K, ReadQ4K<true>, Affine::kMinimum>{});
    case Format::kQ6_K:
      return read(true, CodeLayout<Format::kQ6_K, ReadQ6K>{});
  }
  return false;
}

// Calls f(i, k, vectors of R times W rows) for each k of [begin, end), which are whole words of rows of K, or whole
// units of blocks. Blocks of kSumBlock steps have sums of their own: where a unit is C of them they run side by side,
// as block i, else i is 0. after(next k of block 0, how many blocks) follows each part of a unit. False where a code or
// a scale has no value that the reader knows: nothing that f did may be used then.
template <class Layout, int R, int C, class F, class After>
FFN_FN bool for_each_code(const CodeLanes* lanes, int64_t K, int64_t begin, int64_t end, const F& f,
                          const After& after) {
  using V = Vec<float>;
  using Read = typename Layout::Read;
  constexpr Affine kAffine = Layout::kAffine;
  constexpr int64_t W = V::kLanes, kUnit = Read::kUnit;
  constexpr int kSteps = Read::kUnit / Read::kParts;
  const Codes& c = *lanes[0].matrix->codes;
  const int64_t columns = columns_of_group(c), groups = divide_up(K, columns);
  ScaledRows<Layout> rows[R];
  for (int r = 0; r < R; ++r) rows[r].begin(lanes[r]);
  int64_t loaded = -1;  // of each W groups
  Read read(c);
  const auto multiply = [&](int64_t k, int parts, auto blocks) __attribute__((always_inline)) {
    constexpr int B = decltype(blocks)::value;
    const int64_t at = read.offset(k);
    typename Read::Unit units[R];
    FFN_UNROLL
    for (int r = 0; r < R; ++r) read.load(rows[r].row, at, parts, units[r]);
    AskedRows<Layout, R> ask(rows, c, k);
    const int parts_of_block = parts / B;
    int64_t group[B], group_end[B];  // of the part at hand, and where it ends
    [[maybe_unused]] Uint32Lanes exponents[B][R];
    FFN_UNROLL
    for (int i = 0; i < B; ++i) {
      group[i] = (k + i * kSumBlock) / columns - 1;
      group_end[i] = 0;
    }
#pragma GCC unroll 1
    for (int part = 0; part < parts_of_block; ++part) {
      ask.until(part + 1, parts_of_block);
      const int64_t k_part = k + part * kSteps;
      V scales[B][R], offsets[B][R];
      decltype(read.word(units[0], 0)) words[B][R];
      FFN_UNROLL
      for (int i = 0; i < B; ++i) {
        if (k_part + i * kSumBlock >= group_end[i]) {
          group_end[i] = (++group[i] + 1) * columns;
          if (group[i] / W != loaded) {  // by the first block: W groups are whole units
            loaded = group[i] / W;
            for (int r = 0; r < R; ++r) rows[r].load_groups(*lanes[r].matrix->codes, loaded * W, groups);
          }
          if constexpr (kAffine == Affine::kExponent) {
            for (int r = 0; r < R; ++r) exponents[i][r] = rows[r].exponent_pairs(group[i]);
          }
        }
        FFN_UNROLL
        for (int r = 0; r < R; ++r) {
          words[i][r] = read.word(units[r], part + i * parts_of_block);
          if constexpr (kAffine == Affine::kExponent) {
            words[i][r] = Read::Nibbles::scaled(words[i][r], exponents[i][r]);
          } else {
            scales[i][r] = load<V>(rows[r].scales + group[i] % W * W);
            if constexpr (kAffine != Affine::kScale) offsets[i][r] = load<V>(rows[r].offsets + group[i] % W * W);
          }
        }
      }
      FFN_UNROLL
      for (int e = 0; e < kSteps; ++e) {
        FFN_UNROLL
        for (int i = 0; i < B; ++i) {
          V b[R];
          FFN_UNROLL
          for (int r = 0; r < R; ++r) {
            b[r] = V(read.value(words[i][r], e));
            if constexpr (kAffine == Affine::kZero) b[r] = b[r] - offsets[i][r];
            if constexpr (kAffine == Affine::kMinimum)
              b[r] = fma(b[r], scales[i][r], offsets[i][r]);  // an exact product
            else if constexpr (kAffine != Affine::kExponent) b[r] = b[r] * scales[i][r];
          }
          f(i, k_part + i * kSumBlock + e, b);
        }
      }
      after(k_part + kSteps, B);
    }
  };
  constexpr int kBlocks = C * kSumBlock == kUnit ? C : 1;
  int64_t k = begin;
  for (; k + kUnit <= end; k += kUnit) multiply(k, Read::kParts, std::integral_constant<int, kBlocks>{});
  if (k < end) multiply(k, static_cast<int>((end - k) / kSteps), std::integral_constant<int, 1>{});
  bool ok = read.ok();
  for (int r = 0; r < R; ++r) ok = ok && rows[r].fit();
  return ok;
}
