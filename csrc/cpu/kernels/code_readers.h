// SPDX-License-Identifier: BSD-3-Clause
// Textual, per instruction set: the readers of lanes_of_codes.h, one for each layout of codes.

// The readers. `load` moves a unit of at most kUnit steps of k into lanes; it falls into at most kParts, of kUnit /
// kParts steps each: `word` prepares a part, `value` gives the code of step e of it, times 1 / kFactor.

// `count` words, a multiple of four, of W rows.
FFN_FN void transpose_more_words(const uint8_t* const* rows, int64_t at, int count, Uint32Lanes* out) {
  int i = 0;
  if constexpr (kTransposesEight) {
    for (; i + 8 <= count; i += 8) transpose_eight_words(rows, at + 4 * i, out + i);
  }
  for (; i < count; i += 4) {
    Uint32Lanes four[4];
    transpose_words(rows, at + 4 * i, four);
    for (int d = 0; d < 4; ++d) out[i + d] = four[d];
  }
}

// Words of four bytes of W rows: 64 bytes of each with AVX-512, so that a cache line is read at once, however rows lie.
template <int kBits>
struct ReadWords {
  static constexpr int kParts = Vec<float>::kLanes;
  static constexpr int kUnit = kParts * 32 / kBits;
  struct Unit {
    Uint32Lanes words[kParts];
  };
  FFN_FN int64_t offset(int64_t k) const { return k * kBits / 8; }
  FFN_FN static void load(const uint8_t* const* rows, int64_t at, int parts, Unit& unit) {
    if constexpr (kBits == 4 || kParts < 16) {  // whole vectors where their arithmetic leaves time for it
      transpose_more_words(rows, at, parts, unit.words);
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
  static constexpr float kFactor = kNibbleFactor * (kFp4 ? 0.5f : 1.0f);  // of kTwiceFp4
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

// q8_0: a block.
struct ReadQ80 {
  static constexpr int kUnit = 32, kParts = 8;
  static constexpr float kFactor = kOfTopBits<8>;
  struct Unit {
    Uint32Lanes words[8];
  };
  FFN_FN explicit ReadQ80(const Codes&) {}
  FFN_FN int64_t offset(int64_t k) const { return k / 32 * 34 + 2; }
  FFN_FN static void load(const uint8_t* const* rows, int64_t at, int, Unit& unit) {
    transpose_more_words(rows, at, 8, unit.words);
  }
  FFN_FN Uint32Lanes word(const Unit& unit, int part) const { return unit.words[part]; }
  FFN_FN FloatLanes value(Uint32Lanes word, int e) const { return top_bits<8>(word, e); }
  FFN_FN bool ok() const { return true; }
};

// q4_0 and gguf_mxfp4: blocks whose 16 bytes hold 16 low nibbles, then 16 high ones.
template <bool kFp4, bool kExponents, int kBlocks = 1>
struct ReadBlocks4 {
  static constexpr int kUnit = 32 * kBlocks, kParts = 8 * kBlocks;
  static constexpr float kFactor = kNibbleFactor * (kFp4 ? 0.5f : 1.0f);
  struct Unit {
    Uint32Lanes words[4 * kBlocks];
  };
  using Nibbles = typename NibblesOf<kExponents>::Type;
  Nibbles nibbles;
  FFN_FN explicit ReadBlocks4(const Codes&) : nibbles(kFp4 ? kTwiceFp4 : kMinus8) {}
  FFN_FN int64_t offset(int64_t k) const { return kFp4 ? k / 32 * 17 + 1 : k / 32 * 18 + 2; }
  FFN_FN static void load(const uint8_t* const* rows, int64_t at, int parts, Unit& unit) {
    for (int i = 0; i < parts / 2; i += 4) transpose_more_words(rows, at + i / 4 * (kFp4 ? 17 : 18), 4, unit.words + i);
  }
  FFN_FN auto word(const Unit& unit, int part) const {
    const uint32_t at = static_cast<uint32_t>(part);
    return nibbles.word(unit.words[at / 8 * 4 + at % 4] >> (at / 4 % 2 * 4));
  }
  template <class Word>
  FFN_FN FloatLanes value(const Word& word, int e) const {
    return nibbles.value(word, 2 * e);
  }
  FFN_FN bool ok() const { return true; }
};

// Unsigned codes of kBits, minus 32 where they are six, in the lowest bits of the bytes of a word. Bits above them may
// be anything.
template <int kBits, bool kPairs>
struct ByteCodes {
  static constexpr int kTop = kBits == 6 ? 6 : 8;
  static constexpr float kFactor = kOfTopBits<kTop>;
  FFN_FN Uint32Lanes word(Uint32Lanes words) const {
    return kBits == 6 ? words ^ 0x20202020u : words & (kBits == 5 ? 0x1f1f1f1fu : 0x0f0f0f0fu);
  }
  FFN_FN FloatLanes value(Uint32Lanes word, int e) const { return top_bits<kTop>(word, e); }
};
template <int kBits>
struct ByteCodes<kBits, true> : BytePairs<kBits, kBits == 6 ? 32 : 0> {
  static constexpr float kFactor = 1;
};

// q4_k and q5_k: 32 bytes hold 32 low nibbles, then 32 high ones; the fifth bits lie in 32 bytes of the block.
template <bool kFifth>
struct ReadQ4K {
  using Bytes = ByteCodes<kFifth ? 5 : 4, kLooksUpPairs>;
  static constexpr int kUnit = 64, kParts = 16;
  static constexpr float kFactor = Bytes::kFactor;
  Bytes bytes;
  struct Unit {
    Uint32Lanes words[8], fifth[kFifth ? 8 : 1];
    uint32_t sub_block;
  };
  FFN_FN explicit ReadQ4K(const Codes&) {}
  FFN_FN int64_t offset(int64_t k) const { return k / 256 * (kFifth ? 176 : 144) + k % 256 / 64 * 32; }
  FFN_FN static void load(const uint8_t* const* rows, int64_t at, int, Unit& unit) {
    const int64_t in_block = at % (kFifth ? 176 : 144);
    transpose_more_words(rows, at + (kFifth ? 48 : 16), 8, unit.words);
    if constexpr (kFifth) transpose_more_words(rows, at - in_block + 16, 8, unit.fifth);
    unit.sub_block = static_cast<uint32_t>(in_block / 16);  // two of them in 32 bytes
  }
  FFN_FN auto word(const Unit& unit, int part) const {
    const uint32_t half = static_cast<uint32_t>(part) / 8, d = static_cast<uint32_t>(part) % 8;
    Uint32Lanes low = unit.words[d] >> (4 * half);
    if constexpr (kFifth)
      low = (low & 0x0f0f0f0fu) | (((unit.fifth[d] >> (unit.sub_block + half)) << 4) & ~0x0f0f0f0fu);
    return bytes.word(low);
  }
  template <class Word>
  FFN_FN FloatLanes value(const Word& word, int e) const {
    return bytes.value(word, e);
  }
  FFN_FN bool ok() const { return true; }
};

// q6_k: half a block of 128 has its low four bits in 64 bytes, the high two in 32, and is stored plus 32.
struct ReadQ6K {
  using Bytes = ByteCodes<6, kLooksUpPairs>;
  static constexpr int kUnit = 128, kParts = 32;
  static constexpr float kFactor = Bytes::kFactor;
  Bytes bytes;
  struct Unit {
    Uint32Lanes words[24];  // low bits, then high ones
  };
  FFN_FN explicit ReadQ6K(const Codes&) {}
  FFN_FN int64_t offset(int64_t k) const { return k / 256 * 210 + k % 256 / 128 * 64; }
  FFN_FN static void load(const uint8_t* const* rows, int64_t at, int, Unit& unit) {
    const int64_t half = at % 210 / 64;
    transpose_more_words(rows, at, 16, unit.words);
    transpose_more_words(rows, at - 32 * half + 128, 8, unit.words + 16);
  }
  FFN_FN auto word(const Unit& unit, int part) const {
    const uint32_t quarter = static_cast<uint32_t>(part) / 8, d = static_cast<uint32_t>(part) % 8;
    const Uint32Lanes low = unit.words[quarter % 2 * 8 + d] >> (quarter / 2 * 4);
    const Uint32Lanes high = (unit.words[16 + d] >> (2 * quarter)) << 4;
    return bytes.word((low & 0x0f0f0f0fu) | (high & ~0x0f0f0f0fu));
  }
  template <class Word>
  FFN_FN FloatLanes value(const Word& word, int e) const {
    return bytes.value(word, e);
  }
  FFN_FN bool ok() const { return true; }
};
