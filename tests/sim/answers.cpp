// SPDX-License-Identifier: Apache-2.0
// answers              prints what every check and every toy computes: name, ulp, words in hex
// answers FILE [NAME]  compares that, or NAME's alone, with FILE, which the simulator wrote
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <ios>
#include <iterator>
#include <sstream>
#include <string>

#include "checks.h"
#include "toys.h"

namespace {

using frnn::checks::Answer;

constexpr int kToys = std::size(frnn::toys::kNames);

const char* name(int i) {
  using namespace frnn;
  return i < checks::kCount ? checks::kNames[i] : toys::kNames[i - checks::kCount];
}

Answer compute(int i) {
  using namespace frnn;
  if (i < checks::kCount) return checks::run(i);
  const auto toy = static_cast<toys::Toy>(i - checks::kCount);
  return checks::answer(toys::run_toy(toy, toys::Bug::kNone));
}

// The floats' place in their order, so that neighbours are 1 apart.
int64_t place(uint32_t bits) {
  const auto magnitude = static_cast<int64_t>(bits & 0x7fffffffu);
  return bits >> 31 ? -magnitude : magnitude;
}

bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

// Empty, or how the device departs from the simulator.
std::string difference(const Answer& device, const Answer& simulator) {
  if (device.words.size() != simulator.words.size()) return "another number of words";
  for (size_t i = 0; i < device.words.size(); ++i) {
    const uint32_t a = device.words[i], b = simulator.words[i];
    if (a == b) continue;
    if (simulator.ulp > 0 && !is_nan(a) && !is_nan(b) &&
        std::abs(place(a) - place(b)) <= simulator.ulp) {
      continue;
    }
    char text[120];
    std::snprintf(text, sizeof(text), "word %zu is 0x%08x, in the simulator 0x%08x (ulp: %d)", i, a,
                  b, simulator.ulp);
    return text;
  }
  return "";
}

void print(int i) {
  const Answer a = compute(i);
  std::printf("%s %d", name(i), a.ulp);
  for (uint32_t word : a.words) std::printf(" %08x", word);
  std::puts("");
}

// Whether what this program computes is what a line of the simulator's file says.
bool agrees(const std::string& line) {
  std::istringstream words(line);
  std::string wanted;
  Answer simulator;
  words >> wanted >> simulator.ulp >> std::hex;
  for (uint32_t word; words >> word;) simulator.words.push_back(word);
  for (int i = 0; i < frnn::checks::kCount + kToys; ++i) {
    if (wanted != name(i)) continue;
    std::string failure;
    try {
      failure = difference(compute(i), simulator);
    } catch (const std::exception& error) {
      failure = error.what();
    }
    std::printf("%s: %s\n", name(i), failure.empty() ? "as in the simulator" : failure.c_str());
    return failure.empty();
  }
  std::printf("%s: no such check\n", wanted.c_str());
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 1) {
    for (int i = 0; i < frnn::checks::kCount + kToys; ++i) print(i);
    return 0;
  }
  std::ifstream file(argv[1]);
  int compared = 0, failed = 0;
  for (std::string line; std::getline(file, line);) {
    if (argc > 2 && line.substr(0, line.find(' ')) != argv[2]) continue;
    ++compared;
    if (!agrees(line)) ++failed;
  }
  if (compared == 0) std::puts("nothing to compare");
  return compared == 0 || failed > 0;
}
