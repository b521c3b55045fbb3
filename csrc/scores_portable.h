// Pairs of bf16 on plain float vectors: each product and sum is rounded to float32.

using Half = float;  // queries and probabilities: float32 that holds 8 bits of mantissa

inline Half round_half(float x) { return from_bf16(to_bf16(x)); }

// Dekker's split: x times 2^16 + 1, less the excess, keeps 24 - 16 bits. For 0 <= x <= 1.
inline void round_row(const float* x, int64_t n, Half* out) {
  for (int64_t i = 0; i < n; i += W) {
    const V value = load(x + i), c = mul(value, set1(65537.0F));
    store(out + i, sub(c, sub(c, value)));
  }
}

struct Pairs {  // of W pairs of neighbours
  V even, odd;
};
#if GODWIT_AVX2
inline Pairs widen(__m256i x) {
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000U))))}};
}
inline Pairs pairs(const uint16_t* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Pairs pairs(const uint16_t* p, int64_t n) {
  return widen(_mm256_maskload_epi32(reinterpret_cast<const int*>(p), mask_of(n)));
}
#else
inline Pairs pairs(const uint16_t* p) { return {set1(from_bf16(p[0])), set1(from_bf16(p[1]))}; }
inline Pairs pairs(const uint16_t* p, int64_t) { return pairs(p); }
#endif
inline Pairs same_pair(const Half* p) { return {set1(p[0]), set1(p[1])}; }

// c + a.even b.even + a.odd b.odd in every lane.
inline V dot2(const Pairs& a, const Pairs& b, V c) { return fma(a.odd, b.odd, fma(a.even, b.even, c)); }
