"""The effect of compressing one tile while others are compressed, too: random masks and ridge regression.

A mask m says which tiles are compressed, m_t in {0, 1}. With the losses L_k of K masks m_k of one sample,

    L_k ~ a + sum_t b_t (m_kt - p_t),      p_t = mean_k m_kt,      a = mean_k L_k
    b = argmin sum_k (L_k - a - sum_t b_t (m_kt - p_t))^2 + penalty * sum_t b_t^2

b_t is what compressing tile t adds to the loss, on average over the rates that the other tiles have in the
masks. So the tile's expected losses at both rates are a - b_t p_t (full) and a + b_t (1 - p_t) (compressed).
The penalty is in units of masks: with few masks per tile it pulls effects towards 0. Numpy only.

Shapes: T tiles of a sample, K masks.
"""

import numpy as np


def losses_at_both_rates(
    masks_KT: np.ndarray, losses_K: np.ndarray, penalty: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the expected loss of the sample with tile t full and with tile t compressed, float64 [T] each.

    Noise may make an estimate negative, which no loss is; it then is 0.
    """
    masks, losses = np.asarray(masks_KT, np.float64), np.asarray(losses_K, np.float64)
    share_T, mean = masks.mean(0), losses.mean()
    centred_KT = masks - share_T
    products_TT = centred_KT.T @ centred_KT + penalty * np.eye(len(share_T))
    effect_T = np.linalg.solve(products_TT, centred_KT.T @ (losses - mean))
    full_T, compressed_T = mean - effect_T * share_T, mean + effect_T * (1 - share_T)
    return np.maximum(full_T, 0.0), np.maximum(compressed_T, 0.0)
