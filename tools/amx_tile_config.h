/* Forced into every C++ file of llama.cpp (-include), see llama_environment.py.

   GCC's _tile_loadconfig tells the compiler of the first 8 of the 64 bytes that `ldtilecfg` reads. GCC 12 then drops the
   stores to the others where the configuration is a local variable, as it is in ggml-cpu/amx/mmq.cpp, and the first
   product of more than one token ends the process with a general protection fault. This names all 64. */
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%X0" ::"m"(*(const char(*)[64])(config)))
#endif
