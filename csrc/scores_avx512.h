// Pairs of bf16 with the dot products of AVX-512 BF16.

using Half = uint16_t;  // queries and probabilities: bf16

inline Half round_half(float x) { return to_bf16(x); }

inline void round_row(const float* x, int64_t n, Half* out) {
  for (int64_t i = 0; i < n; i += W) {
    const __m256bh half = _mm512_cvtneps_pbh(load(x + i).v);
    std::memcpy(out + i, &half, sizeof(half));
  }
}

struct Pairs {  // of W pairs of neighbours
  __m512bh v;
};
inline Pairs pairs(__m512i x) {
  Pairs out;
  std::memcpy(&out.v, &x, sizeof(x));
  return out;
}
inline Pairs pairs(const uint16_t* p) { return pairs(_mm512_loadu_si512(p)); }
inline Pairs pairs(const uint16_t* p, int64_t n) {
  return pairs(_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1U << n) - 1), p));
}
inline Pairs same_pair(const Half* p) {
  int32_t both;
  std::memcpy(&both, p, sizeof(both));
  return pairs(_mm512_set1_epi32(both));
}

// c + a.even b.even + a.odd b.odd in every lane.
inline V dot2(const Pairs& a, const Pairs& b, V c) { return {_mm512_dpbf16_ps(c.v, a.v, b.v)}; }
