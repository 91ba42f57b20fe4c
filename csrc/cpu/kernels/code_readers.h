// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: the readers of lanes_of_codes.h, one for each layout of codes.

// The readers. `load` moves a unit of kUnit steps of k into lanes; it falls into kParts, of kUnit / kParts steps each:
// `word` prepares a part, `value` gives the code of step e of it.

template <bool kFp4>
struct ReadNibbles {
  static constexpr int kUnit = 32, kParts = 4, kBytes = 16;
  struct Unit {
    Uint32Lanes words[4];
  };
  WordTable table;
  FFN_FN explicit ReadNibbles(const Codes& c)
      : table(word_table(kFp4                        ? kTwiceFp4
                         : c.format == Format::kInt4 ? kMinus8
                                                     : kPlain)) {}
  FFN_FN int64_t offset(int64_t k) const { return k / 2; }
  FFN_FN void load(const uint8_t* const* rows, int64_t at, Unit& unit) { transpose_words(rows, at, unit.words); }
  FFN_FN NibbleWord word(const Unit& unit, int part) const { return nibble_word(table, unit.words[part]); }
  FFN_FN FloatLanes value(const NibbleWord& word, int e) const { return nibble_value(table, word, e); }
  FFN_FN bool ok() const { return true; }
};

// The codes that four bytes of kBits each hold: two's complement.
template <int kBits>
FFN_FN FloatLanes signed_byte(Uint32Lanes word, int e) {
  constexpr int kTop = 32 - kBits;
  return __builtin_convertvector((Int32Lanes)(word << (kTop - 8 * e)) >> kTop, FloatLanes);
}

template <bool kBlocks>  // of q8_0
struct ReadInt8 {
  static constexpr int kUnit = 16, kParts = 4, kBytes = 16;
  struct Unit {
    Uint32Lanes words[4];
  };
  FFN_FN explicit ReadInt8(const Codes&) {}
  FFN_FN int64_t offset(int64_t k) const { return kBlocks ? k / 32 * 34 + 2 + k % 32 : k; }
  FFN_FN void load(const uint8_t* const* rows, int64_t at, Unit& unit) { transpose_words(rows, at, unit.words); }
  FFN_FN Uint32Lanes word(const Unit& unit, int part) const { return unit.words[part]; }
  FFN_FN FloatLanes value(Uint32Lanes word, int e) const { return signed_byte<8>(word, e); }
  FFN_FN bool ok() const { return true; }
};

struct ReadFp8 {
  static constexpr int kUnit = 16, kParts = 4, kBytes = 16;
  struct Unit {
    Uint32Lanes words[4];
  };
  Uint32Lanes nan{};  // the highest bit of a byte: a code of a row was NaN
  FFN_FN explicit ReadFp8(const Codes&) {}
  FFN_FN int64_t offset(int64_t k) const { return k; }
  FFN_FN void load(const uint8_t* const* rows, int64_t at, Unit& unit) {
    transpose_words(rows, at, unit.words);
    for (const Uint32Lanes w : unit.words) nan |= (w & 0x7f7f7f7fu) + 0x01010101u;
  }
  FFN_FN Uint32Lanes word(const Unit& unit, int part) const { return unit.words[part]; }
  // The exponent and mantissa at a float's place give t = 2^(e - 7) (1 + m / 8). Where e is 0, the code stands for
  // 2^-6 m / 8, which is 2 t - 2^-6: the smaller of both there, and nowhere else.
  FFN_FN FloatLanes value(Uint32Lanes word, int e) const {
    const Uint32Lanes placed = e == 3 ? word >> 4 : word << (20 - 8 * e);
    const auto t = (FloatLanes)((placed & 0x07f00000u) + 0x3c000000u);
    const FloatLanes magnitude = min_lanes(t, fma_lanes(t, broadcast_lanes(2.0f), broadcast_lanes(-0x1p-6f)));
    return (FloatLanes)((Uint32Lanes)magnitude | ((word << (24 - 8 * e)) & 0x80000000u));
  }
  FFN_FN bool ok() const {
    uint32_t any = 0;
    for (int i = 0; i < Vec<float>::kLanes; ++i) any |= nan[i];
    return (any & 0x80808080u) == 0;
  }
};

// q4_0 and gguf_mxfp4: 16 bytes hold 16 low nibbles, then 16 high ones.
template <bool kFp4>
struct ReadBlocks4 {
  static constexpr int kUnit = 32, kParts = 8, kBytes = 16;
  struct Unit {
    Uint32Lanes words[4];
  };
  WordTable table;
  FFN_FN explicit ReadBlocks4(const Codes&) : table(word_table(kFp4 ? kTwiceFp4 : kMinus8)) {}
  FFN_FN int64_t offset(int64_t k) const { return kFp4 ? k / 32 * 17 + 1 : k / 32 * 18 + 2; }
  FFN_FN void load(const uint8_t* const* rows, int64_t at, Unit& unit) { transpose_words(rows, at, unit.words); }
  FFN_FN NibbleWord word(const Unit& unit, int part) const {
    return nibble_word(table, unit.words[part % 4] >> (part / 4 * 4));
  }
  FFN_FN FloatLanes value(const NibbleWord& word, int e) const { return nibble_value(table, word, 2 * e); }
  FFN_FN bool ok() const { return true; }
};

// q4_k and q5_k: 32 bytes hold 32 low nibbles, then 32 high ones; the fifth bits lie in 32 bytes of the block.
template <bool kFifth>
struct ReadQ4K {
  static constexpr int kUnit = 64, kParts = 16, kBytes = 32;
  struct Unit {
    Uint32Lanes words[8], fifth[kFifth ? 8 : 1];
    int sub_block;
  };
  FFN_FN explicit ReadQ4K(const Codes&) {}
  FFN_FN int64_t offset(int64_t k) const { return k / 256 * (kFifth ? 176 : 144) + k % 256 / 64 * 32; }
  FFN_FN void load(const uint8_t* const* rows, int64_t at, Unit& unit) {
    const int64_t in_block = at % (kFifth ? 176 : 144);
    const int64_t from = at + (kFifth ? 48 : 16);
    Uint32Lanes four[4];
    for (int half = 0; half < 2; ++half) {
      transpose_words(rows, from + 16 * half, four);
      for (int d = 0; d < 4; ++d) unit.words[4 * half + d] = four[d];
      if constexpr (kFifth) {
        transpose_words(rows, at - in_block + 16 + 16 * half, four);
        for (int d = 0; d < 4; ++d) unit.fifth[4 * half + d] = four[d];
      }
    }
    unit.sub_block = static_cast<int>(in_block / 16);  // two of them in 32 bytes
  }
  FFN_FN Uint32Lanes word(const Unit& unit, int part) const {
    const int half = part / 8, d = part % 8;
    Uint32Lanes low = (unit.words[d] >> (4 * half)) & 0x0f0f0f0fu;
    if constexpr (kFifth) low |= ((unit.fifth[d] >> (unit.sub_block + half)) & 0x01010101u) << 4;
    return low;
  }
  FFN_FN FloatLanes value(Uint32Lanes word, int e) const { return signed_byte<8>(word, e); }
  FFN_FN bool ok() const { return true; }
};

// q6_k: half a block of 128 has its low four bits in 64 bytes, the high two in 32, and is stored plus 32.
struct ReadQ6K {
  static constexpr int kUnit = 128, kParts = 32, kBytes = 64;
  struct Unit {
    Uint32Lanes words[24];  // low bits, then high ones
  };
  FFN_FN explicit ReadQ6K(const Codes&) {}
  FFN_FN int64_t offset(int64_t k) const { return k / 256 * 210 + k % 256 / 128 * 64; }
  FFN_FN void load(const uint8_t* const* rows, int64_t at, Unit& unit) {
    const int64_t half = at % 210 / 64;
    Uint32Lanes four[4];
    for (int i = 0; i < 6; ++i) {
      transpose_words(rows, i < 4 ? at + 16 * i : at - 32 * half + 128 + 16 * (i - 4), four);
      for (int d = 0; d < 4; ++d) unit.words[4 * i + d] = four[d];
    }
  }
  FFN_FN Uint32Lanes word(const Unit& unit, int part) const {
    const int quarter = part / 8, d = part % 8;
    const Uint32Lanes low = (unit.words[quarter % 2 * 8 + d] >> (quarter / 2 * 4)) & 0x0f0f0f0fu;
    return (low | (((unit.words[16 + d] >> (2 * quarter)) & 0x03030303u) << 4)) ^ 0x20202020u;  // minus 32
  }
  FFN_FN FloatLanes value(Uint32Lanes word, int e) const { return signed_byte<6>(word, e); }
  FFN_FN bool ok() const { return true; }
};
