"""The effect of compressing one tile while others are compressed, too: random masks and ridge regression.

A mask m says which tiles are compressed, m_t in {0, 1}. With the losses L_k of K masks m_k of one sample,

    L_k ~ a + sum_t b_t (m_kt - p_t),      p_t = mean_k m_kt,      a = mean_k L_k
    b = argmin sum_k (L_k - a - sum_t b_t (m_kt - p_t))^2 + penalty * sum_t b_t^2

b_t is what compressing tile t adds to the loss, on average over the rates that the other tiles have in the
masks. The loss with no tile compressed, L_0, is computed, too, and the tile's losses at both rates are L_0
and L_0 + b_t. Both are without the other tiles' effects: with them, the ratio of the two would approach 1
the more tiles a sample has, and one tau for all samples would label by the number of tiles. The penalty is in
units of masks: with few masks per tile it pulls effects towards 0. Numpy only.

Shapes: T tiles of a sample, K masks.
"""

import numpy as np


def compressed_losses(
    masks_KT: np.ndarray, losses_K: np.ndarray, loss_full: float, penalty: float
) -> np.ndarray:
    """Return the loss with each tile compressed, float64 [T]: that with none compressed plus its effect.

    Noise may make an estimate negative, which no loss is; it then is 0.
    """
    masks, losses = np.asarray(masks_KT, np.float64), np.asarray(losses_K, np.float64)
    centred_KT = masks - masks.mean(0)
    products_TT = centred_KT.T @ centred_KT + penalty * np.eye(masks.shape[1])
    effect_T = np.linalg.solve(products_TT, centred_KT.T @ (losses - losses.mean()))
    return np.maximum(loss_full + effect_T, 0.0)
