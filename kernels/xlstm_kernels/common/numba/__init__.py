"""What all compiled loops for the CPU share: vectors, the compiler with its cache, threads."""
