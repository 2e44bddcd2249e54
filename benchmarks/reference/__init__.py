"""One AR-CoPO iteration as today's codebases write it, in plain PyTorch: what the engine is compared with, in results and in time.

    wan.py          the causal Wan forward over a dense K/V cache: complex RoPE, separate norms, F.scaled_dot_product_attention
    iteration.py    G full rollouts one after the other, whole-video decodes, rewards, replay of the anchors, AdamW

Read top to bottom it is the algorithm without any of our ideas about speed or memory, and without our engine, kernels and forward. It
shares with them the weights (the modules of a CausalWan, adapters included), the noise, the schedule and the rewards, so that all it gives
can be compared.
"""
