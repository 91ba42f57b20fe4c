// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: the readers of lanes_of_codes.h, one for each layout of codes.

// The readers. `load` moves a unit of at most kUnit steps of k into lanes; it falls into at most kParts, of kUnit /
// kParts steps each: `word` prepares a part, `value` gives the code of step e of it, times 1 / kFactor.

// Words of four bytes of W rows. Whole vectors are read from each row, so that a cache line is read once or twice,
// however rows lie; 16 bytes where few registers are left.
template <int kBits>
struct ReadWords {
  static constexpr int kParts = kBits == 4 && Vec<float>::kLanes == 8 ? 4 : Vec<float>::kLanes;
  static constexpr int kUnit = kParts * 32 / kBits, kBytes = 4 * kParts;
  struct Unit {
    Uint32Lanes words[kParts];
  };
  FFN_FN int64_t offset(int64_t k) const { return k * kBits / 8; }
  FFN_FN void load(const uint8_t* const* rows, int64_t at, int parts, Unit& unit) {
    if constexpr (kParts < Vec<float>::kLanes) {
      transpose_words(rows, at, unit.words);
    } else {
      Vec<float> words[kParts];
      FFN_UNROLL
      for (int i = 0; i < kParts; ++i)
        words[i] = load_part<Vec<float>>(reinterpret_cast<const float*>(rows[i] + at), parts);
      transpose(words);
      for (int i = 0; i < kParts; ++i) unit.words[i] = (Uint32Lanes)words[i].reg;
    }
  }
  FFN_FN Uint32Lanes word(const Unit& unit, int part) const { return unit.words[part]; }
  FFN_FN bool ok() const { return true; }
};

struct PlainNibbles {
  WordTable table;
  FFN_FN explicit PlainNibbles(const int8_t* values) : table(word_table(values)) {}
  FFN_FN NibbleWord word(Uint32Lanes words) const { return nibble_word(table, words); }
  FFN_FN FloatLanes value(const NibbleWord& word, int e) const { return nibble_value(table, word, e); }
};
template <bool kExponents>
struct NibblesOf {
  using Type = PlainNibbles;
};
template <>
struct NibblesOf<true> {
  using Type = NibblePairs;
};

template <bool kFp4, bool kExponents>
struct ReadNibbles : ReadWords<4> {
  static constexpr float kFactor = kFp4 ? 0.5f : 1.0f;  // of kTwiceFp4
  using Nibbles = typename NibblesOf<kExponents>::Type;
  Nibbles nibbles;
  FFN_FN explicit ReadNibbles(const Codes& c)
      : nibbles(kFp4                        ? kTwiceFp4
                : c.format == Format::kInt4 ? kMinus8
                                            : kPlain) {}
  FFN_FN auto word(const Unit& unit, int part) const { return nibbles.word(ReadWords<4>::word(unit, part)); }
  template <class Word>
  FFN_FN FloatLanes value(const Word& word, int e) const {
    return nibbles.value(word, e);
  }
};

// The codes that four bytes of kBits each hold: two's complement. They stay at the top of an integer.
template <int kBits>
constexpr float kOfTopBits = 1.0f / (1u << (32 - kBits));
template <int kBits>
FFN_FN FloatLanes top_bits(Uint32Lanes word, int e) {
  constexpr int kTop = 32 - kBits;
  Uint32Lanes top = e * 8 == kTop ? word : word << (kTop - 8 * e);
  if (e > 0 || kBits < 8) top &= ~0u << kTop;
  return to_float_lanes(top);
}

struct ReadInt8 : ReadWords<8> {
  static constexpr float kFactor = kOfTopBits<8>;
  FFN_FN explicit ReadInt8(const Codes&) {}
  FFN_FN FloatLanes value(Uint32Lanes word, int e) const { return top_bits<8>(word, e); }
};

// Whether this thread takes denormals as zero, as torch.set_flush_denormal asks for.
FFN_FN bool denormals_are_zero() {
  float smallest = 0x1p-149f;
  asm volatile("" : "+m"(smallest));  // else the compiler computes it
  return smallest * 0x1p120f == 0;
}

struct ReadFp8 : ReadWords<8> {
  static constexpr float kFactor = 0x1p120f;
  Uint32Lanes nan{};  // the highest bit of a byte: a code of a row was NaN
  FFN_FN explicit ReadFp8(const Codes&) {}
  struct Word {
    Int16Lanes even, odd;
  };
  FFN_FN Word word(const Unit& unit, int part) {
    const Uint32Lanes w = ReadWords<8>::word(unit, part);
    nan |= (w & 0x7f7f7f7fu) + 0x01010101u;
    return {(Int16Lanes)w << 8 >> 4, (Int16Lanes)w >> 4};
  }
  // Exponent and mantissa at a float's place, with its sign: also where the exponent is 0, which is denormal then.
  FFN_FN FloatLanes value(const Word& word, int e) const {
    const Uint32Lanes pair = (Uint32Lanes)(e % 2 ? word.odd : word.even);
    return (FloatLanes)((e < 2 ? pair << 16 : pair) & 0x87f00000u);
  }
  FFN_FN bool ok() const {
    uint32_t any = 0;
    for (int i = 0; i < Vec<float>::kLanes; ++i) any |= nan[i];
    return (any & 0x80808080u) == 0 && !denormals_are_zero();
  }
};

// q8_0: half a block.
struct ReadQ80 {
  static constexpr int kUnit = 16, kParts = 4, kBytes = 16;
  static constexpr float kFactor = kOfTopBits<8>;
  struct Unit {
    Uint32Lanes words[4];
  };
  FFN_FN explicit ReadQ80(const Codes&) {}
  FFN_FN int64_t offset(int64_t k) const { return k / 32 * 34 + 2 + k % 32; }
  FFN_FN void load(const uint8_t* const* rows, int64_t at, int, Unit& unit) { transpose_words(rows, at, unit.words); }
  FFN_FN Uint32Lanes word(const Unit& unit, int part) const { return unit.words[part]; }
  FFN_FN FloatLanes value(Uint32Lanes word, int e) const { return top_bits<8>(word, e); }
  FFN_FN bool ok() const { return true; }
};

// q4_0 and gguf_mxfp4: 16 bytes hold 16 low nibbles, then 16 high ones.
template <bool kFp4, bool kExponents>
struct ReadBlocks4 {
  static constexpr int kUnit = 32, kParts = 8, kBytes = 16;
  static constexpr float kFactor = kFp4 ? 0.5f : 1.0f;
  struct Unit {
    Uint32Lanes words[4];
  };
  using Nibbles = typename NibblesOf<kExponents>::Type;
  Nibbles nibbles;
  FFN_FN explicit ReadBlocks4(const Codes&) : nibbles(kFp4 ? kTwiceFp4 : kMinus8) {}
  FFN_FN int64_t offset(int64_t k) const { return kFp4 ? k / 32 * 17 + 1 : k / 32 * 18 + 2; }
  FFN_FN void load(const uint8_t* const* rows, int64_t at, int, Unit& unit) { transpose_words(rows, at, unit.words); }
  FFN_FN auto word(const Unit& unit, int part) const { return nibbles.word(unit.words[part % 4] >> (part / 4 * 4)); }
  template <class Word>
  FFN_FN FloatLanes value(const Word& word, int e) const {
    return nibbles.value(word, 2 * e);
  }
  FFN_FN bool ok() const { return true; }
};

// q4_k and q5_k: 32 bytes hold 32 low nibbles, then 32 high ones; the fifth bits lie in 32 bytes of the block.
template <bool kFifth>
struct ReadQ4K {
  static constexpr int kUnit = 64, kParts = 16, kBytes = 32;
  static constexpr float kFactor = kOfTopBits<8>;
  struct Unit {
    Uint32Lanes words[8], fifth[kFifth ? 8 : 1];
    int sub_block;
  };
  FFN_FN explicit ReadQ4K(const Codes&) {}
  FFN_FN int64_t offset(int64_t k) const { return k / 256 * (kFifth ? 176 : 144) + k % 256 / 64 * 32; }
  FFN_FN void load(const uint8_t* const* rows, int64_t at, int, Unit& unit) {
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
  FFN_FN FloatLanes value(Uint32Lanes word, int e) const { return top_bits<8>(word, e); }
  FFN_FN bool ok() const { return true; }
};

// q6_k: half a block of 128 has its low four bits in 64 bytes, the high two in 32, and is stored plus 32.
struct ReadQ6K {
  static constexpr int kUnit = 128, kParts = 32, kBytes = 64;
  static constexpr float kFactor = kOfTopBits<6>;
  struct Unit {
    Uint32Lanes words[24];  // low bits, then high ones
  };
  FFN_FN explicit ReadQ6K(const Codes&) {}
  FFN_FN int64_t offset(int64_t k) const { return k / 256 * 210 + k % 256 / 128 * 64; }
  FFN_FN void load(const uint8_t* const* rows, int64_t at, int, Unit& unit) {
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
  FFN_FN FloatLanes value(Uint32Lanes word, int e) const { return top_bits<6>(word, e); }
  FFN_FN bool ok() const { return true; }
};
