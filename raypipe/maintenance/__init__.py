"""Whether a run still is what was committed (`verify`), and few large files instead of many parts (`compact`).

Knows the commit protocol from the reader's side and what a damage means. Labels again through `pipeline`, whose
methods it never names. Never imports Ray or `cli`.
"""
