"""Counts of the peer's kernels, to read ours beside: nothing here is a time."""

# mlstm_kernels 2.0.6, xl_chunk, compiled by Triton 3.9.0 with its own defaults (4 warps, 1 stage).
ANCHOR_TABLE = """\
## Anchor: NX-AI mlstm_kernels 2.0.6, xl_chunk, B1 H8 S8192 256/512 bf16, states fp32, Triton 3.9.0
kernel             regs sm_90/sm_80/sm_100/gfx942  spill st/ld sm_90, sm_80  smem sm_90  HGMMA  \
L128 MB / bound us  L256 MB / bound us
recurrent_fw_C          226 / 255 / 208 / 228        0, 0                      16896      8  \
      373 / 111           239 / 71
parallel_fw_Hintra      255 / 255 / 255 / 260        164/164, 788/548          16384     24  \
      474 / 142           340 / 101
fw_C again (bw)                                                                              \
      373 / 111           239 / 71
recurrent_bw_dC         194 / 254 / 198 / 277        0, 0                      16384      8  \
      373 / 111           239 / 71
parallel_bw_dV          240 / 254 / 206 / 225        0, 0                      32768     12  \
      474 / 142           340 / 101
parallel_bw_dK          228 / 255 / 178 / 232        0, 0                      24576     12  \
      474 / 142           340 / 101
parallel_bw_dQ          252 / 255 / 255 / 232        0, 0                      24576     12  \
      474 / 142           340 / 101
gate gradients                                                                               \
      134 / 40            134 / 40
forward / backward / total bound us: L128 253 / 687 / 940, L256 173 / 487 / 660
asynchronous copies: none in any of them; 2 blocks on an SM; 7 launches beside 2-3 of gates"""
