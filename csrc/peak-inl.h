// Multiply-adds on registers only: the limit for the products of a target. Included after its tile products.

// Independent steps: enough to hide their latency, few enough to stay in registers.
#if GODWIT_AVX512
constexpr int kChains = 16;
#elif GODWIT_AVX2
constexpr int kChains = 12;
#else
constexpr int kChains = 8;
#endif

// x a + b. The scalar kernels' std::fma is a library call on some CPUs, which would be timed instead.
inline V chain_step(V x, V a, V b) {
#if GODWIT_SCALAR && !defined(__FP_FAST_FMAF)
  return add(mul(x, a), b);
#else
  return fma(x, a, b);
#endif
}

inline int64_t multiply_float32(int64_t rounds, float* out) {
  V x[kChains];
  for (int i = 0; i < kChains; ++i) x[i] = set1(static_cast<float>(i + 1));
  const V a = set1(0.75F), b = set1(0.5F);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) x[i] = chain_step(x[i], a, b);
  }
  V sum = x[0];
  for (int i = 1; i < kChains; ++i) sum = add(sum, x[i]);
  *out = reduce_add(sum);
  return rounds * kChains * 2 * W;
}

#if GODWIT_AVX512

inline int64_t multiply_int8(int64_t rounds, float* out) {
  __m512i x[kChains];
  for (int i = 0; i < kChains; ++i) x[i] = _mm512_set1_epi32(i);
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) x[i] = _mm512_dpbusd_epi32(x[i], a, b);
  }
  for (int i = 1; i < kChains; ++i) x[0] = _mm512_add_epi32(x[0], x[i]);
  *out = static_cast<float>(_mm512_reduce_add_epi32(x[0]));
  return rounds * kChains * 2 * 64;
}

inline int64_t multiply_bfloat16(int64_t rounds, float* out) {
  V x[kChains];
  for (int i = 0; i < kChains; ++i) x[i] = set1(static_cast<float>(i));
  const Pairs a = pairs(_mm512_set1_epi16(0x3f80)), b = pairs(_mm512_set1_epi16(0x3f00));  // 1 and 1/2
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) x[i] = dot2(a, b, x[i]);
  }
  V sum = x[0];
  for (int i = 1; i < kChains; ++i) sum = add(sum, x[i]);
  *out = reduce_add(sum);
  return rounds * kChains * 2 * 32;
}

#elif GODWIT_AVX2

// Sums of 16 bits, as in the q4 product, which widens them every eight steps. One step of each sum per round:
// otherwise gcc would add the products of several steps first and run out of registers.
inline int64_t multiply_int8(int64_t rounds, float* out) {
  constexpr int kSums = 8;
  __m256i x[kSums];
  for (__m256i& sum : x) sum = _mm256_setzero_si256();
  __m256i a = _mm256_set1_epi8(3);
  const __m256i b = _mm256_set1_epi8(-5);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) {
      x[i] = _mm256_add_epi16(x[i], _mm256_maddubs_epi16(a, b));
      __asm__("" : "+x"(a));  // for all the compiler knows another one, and so another product
    }
  }
#pragma GCC unroll 8
  for (int i = 1; i < kSums; ++i) x[0] = _mm256_xor_si256(x[0], x[i]);
  *out = static_cast<float>(_mm256_extract_epi32(x[0], 0));
  return rounds * kSums * 2 * 32;
}

#else

inline int64_t multiply_int8(int64_t rounds, float* out) {
  uint32_t x[kChains];
  for (int i = 0; i < kChains; ++i) x[i] = static_cast<uint32_t>(i);
  const auto a = static_cast<uint32_t>(rounds) | 1U;  // known only now, or shifts would do
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) x[i] = x[i] * a + 77;
  }
  for (int i = 1; i < kChains; ++i) x[0] ^= x[i];
  *out = static_cast<float>(x[0]);
  return rounds * kChains * 2;
}

#endif

#if GODWIT_AMX

// Registers 0 to 3 hold sums, the others ones.
inline int64_t multiply_tiles(Arithmetic kind, int64_t rounds, float* out) {
  const bool bytes = kind == Arithmetic::int8;
  alignas(64) uint16_t ones[16 * 32];
  alignas(64) int32_t sums[16 * 16];
  for (uint16_t& one : ones) one = bytes ? 0x0101 : 0x3f80;
  configure_spans(16);
  __asm__ volatile("" ::"r"(ones) : "memory");  // the tile loads do not say that they read memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones, 64);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  for (int64_t r = 0; bytes && r < rounds; ++r) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  for (int64_t r = 0; !bytes && r < rounds; ++r) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_release();
  *out = static_cast<float>(sums[0]);
  return rounds * 4 * 2 * 16 * 16 * (bytes ? 64 : 32);
}

inline int64_t multiply(Arithmetic kind, int64_t rounds, float* out) {
  return kind == Arithmetic::float32 ? multiply_float32(rounds, out) : multiply_tiles(kind, rounds, out);
}

#else

inline int64_t multiply(Arithmetic kind, int64_t rounds, float* out) {
  if (kind == Arithmetic::int8) return multiply_int8(rounds, out);
#if GODWIT_AVX512
  if (kind == Arithmetic::bfloat16) return multiply_bfloat16(rounds, out);
#endif
  return multiply_float32(rounds, out);
}

#endif
