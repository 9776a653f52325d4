"""Block denoising for one or many rows: batches, sessions on fixed memory, the fast and the plain passes,
conversations, and the interface for programs.
"""
