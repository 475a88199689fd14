// Tests the host implementations of single instructions against the PTX manual, lane by lane. The tables below are
// copied from the manual's figures and are independent of the formulas in the implementations.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "cuda/device/launch.cuh"

using namespace qlora;
using namespace qlora::cuda;

namespace {

int failures = 0;
void expect(bool ok, const char* what, int a, int b) {
  if (ok) return;
  ++failures;
  std::printf("%s: %d, %d\n", what, a, b);
}

// mma.m16n8k16: (row, column) of the elements of lane 0, and the offset of other lanes (PTX ISA, section on m16n8k16,
// fragment of A: "groupID = laneid >> 2, threadID_in_group = laneid % 4").
struct Element {
  int row, col;
};
constexpr Element kA[8] = {{0, 0}, {0, 1}, {8, 0}, {8, 1},
                           {0, 8}, {0, 9}, {8, 8}, {8, 9}};  // + (groupID, 2 * threadID)
constexpr Element kB[4] = {{0, 0}, {1, 0}, {8, 0}, {9, 0}};  // + (2 * threadID, groupID)
constexpr Element kD[4] = {{0, 0}, {0, 1}, {8, 0}, {8, 1}};  // + (groupID, 2 * threadID)

struct MmaParams {
  int row, step, col;  // a is one at (row, step), b at (step, col): d must be one at (row, col) and zero elsewhere
  float d[32][4];
};
MmaParams current;

template <class T>
void mma_kernel(int) {
  const int lane = ptx::lane(), group = lane >> 2, thread = lane % 4;
  uint32_t a[4] = {}, b[2] = {};
  const uint32_t one = from_float<T>(1.0f).bits;
  for (int i = 0; i < 8; ++i)
    if (kA[i].row + group == current.row && kA[i].col + 2 * thread == current.step) a[i / 2] |= one << (16 * (i % 2));
  for (int i = 0; i < 4; ++i)
    if (kB[i].row + 2 * thread == current.step && kB[i].col + group == current.col) b[i / 2] |= one << (16 * (i % 2));
  const float c[4] = {0.5f, 0.5f, 0.5f, 0.5f};
  ptx::mma<T>(current.d[lane], a, b[0], b[1], c);
}

template <class T>
void check_mma(const char* name) {
  MmaParams& p = current;
  for (p.row = 0; p.row < 16; ++p.row)
    for (p.step = 0; p.step < 16; ++p.step) {
      p.col = (p.row + 3 * p.step) % 8;
      const Status status = start(mma_kernel<T>, {1}, 32, 0, nullptr, 0);
      expect(status.error == nullptr, name, p.row, p.step);
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
          const bool here = kD[i].row + lane / 4 == p.row && kD[i].col + lane % 4 * 2 == p.col;
          expect(p.d[lane][i] == (here ? 1.5f : 0.5f), name, lane, i);
        }
    }
}

void shuffles(int) {
  const int lane = ptx::lane();
  for (int mask = 1; mask < 32; mask *= 2)
    expect(ptx::shuffle_xor(lane, mask) == (lane ^ mask), "shuffle_xor", lane, mask);
  expect(ptx::shuffle(lane * 3, 31 - lane) == (31 - lane) * 3, "shuffle", lane, 0);
  expect(ptx::ballot(lane % 3 == 0) == 0x49249249u, "ballot", lane, 0);
  expect(ptx::popcount(0xF0F00001u) == 9 && ptx::lowest_bit(0x00000140u) == 6, "popcount, lowest_bit", lane, 0);
  expect(ptx::shuffle(lane, lane + 33) == (lane + 1) % 32, "shuffle takes the lane modulo 32", lane, 0);
}

// ldmatrix.x4: element (row, col) of matrix i is 1000 i + 10 row + col. In the manual's figure, thread 4 row + col / 2
// holds columns col and col + 1; with .trans it holds the elements with row and column swapped.
void matrices(int) {
  const int lane = ptx::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, col = 2 * (lane % 4), first = 1000 * i + 10 * row + col;
    ptx::store_shared(128 * i + 16 * row + 2 * col, static_cast<uint32_t>(first | (first + 1) << 16));
  }
  ptx::sync_warp();
  uint32_t plain[4], transposed[4];
  ptx::load_matrices(plain, 16 * lane);
  ptx::load_matrices_transposed(transposed, 16 * lane);
  for (int i = 0; i < 4; ++i)
    for (int row = 0; row < 8; ++row)
      for (int col = 0; col < 8; ++col) {
        if (4 * row + col / 2 != lane) continue;
        const int shift = 16 * (col % 2), mask = 0xFFFF;
        expect(static_cast<int>(plain[i] >> shift & mask) == 1000 * i + 10 * row + col, "ldmatrix", lane, i);
        expect(static_cast<int>(transposed[i] >> shift & mask) == 1000 * i + 10 * col + row, "ldmatrix.trans", lane, i);
      }
}

void conversions() {
  for (int i = 0; i < 1 << 16; ++i) {  // every 16-bit value in both halves
    const auto bits = static_cast<uint32_t>(i);
    const float value = to_float(bf16{static_cast<uint16_t>(bits)});
    if (std::isnan(value)) continue;
    expect(ptx::pack<bf16>(value, 1.0f) == (0x3F80u << 16 | bits), "pack bf16", i, 0);
    expect(ptx::unpack<bf16>(bits << 16 | 0x3F80u, 1) == value, "unpack bf16", i, 1);
    const float half = to_float(fp16{static_cast<uint16_t>(bits)});
    if (std::isnan(half)) continue;
    expect(ptx::pack<fp16>(1.0f, half) == (bits << 16 | 0x3C00u), "pack fp16", i, 1);
    expect(ptx::unpack<fp16>(bits, 0) == half, "unpack fp16", i, 0);
  }
  expect(ptx::pack<bf16>(1.00390625f, 1.01171875f) == (0x3F82u << 16 | 0x3F80u), "ties go to even", 0, 0);
  expect(ptx::byte_of<0>(0xA1B2C3D4u) == 0xD4 && ptx::byte_of<3>(0xA1B2C3D4u) == 0xA1, "byte_of", 0, 3);
  expect(ptx::permute(0x33221100u, 0x77665544u, 0x6240) == 0x66224400u, "prmt", 0x6240, 0);
  expect(ptx::mad<128>(3, 5) == 389, "mad", 0, 0);
}

}  // namespace

int main() {
  check_mma<bf16>("mma bf16");
  check_mma<fp16>("mma fp16");
  const Status status = start(shuffles, {1}, 32, 0, nullptr, 0);
  expect(status.error == nullptr, "shuffles", 0, 0);
  const Status loaded = start(matrices, {1}, 32, 512, nullptr, 0);
  expect(loaded.error == nullptr, "ldmatrix", 0, 0);
  conversions();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
