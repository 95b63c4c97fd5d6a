"""Mamba-2 mixer in NumPy float64, one loop over time; shares no code with the package."""

import numpy as np


def ssd(q, k, v, dt, a, state):
    """q, k (T, H, N), v (T, H, P), dt (T, H), a (H,), state (H, N, P) -> y (T, H, P), state."""
    state = state.astype(np.float64).copy()
    out = np.zeros(v.shape)
    for t in range(len(q)):
        for h in range(q.shape[1]):
            state[h] = np.exp(dt[t, h] * a[h]) * state[h] + dt[t, h] * np.outer(k[t, h], v[t, h])
            out[t, h] = q[t, h] @ state[h]
    return out, state


def silu(x):
    return x / (1 + np.exp(-x))


def mixer(u, w, heads, kv_heads):
    """One sequence u (T, hidden) through the mixer with training-layout weights w (spec 3.2)."""
    u = u.astype(np.float64)
    w = {name: value.astype(np.float64) for name, value in w.items()}
    width = u.shape[1] // heads
    z = np.concatenate([u @ w[f"{p}_proj.weight"].T for p in "vkq"], axis=1)
    shifted = np.concatenate([np.zeros_like(z[:1]), z[:-1]])
    taps = w["conv1d.weight"][:, 0]
    z = silu(taps[:, 0] * shifted + taps[:, 1] * z + w["conv1d.bias"])
    kv = kv_heads * width
    v, k, q = z[:, :kv], z[:, kv : 2 * kv], z[:, 2 * kv :]
    group = np.repeat(np.arange(kv_heads), heads // kv_heads)
    v, k = (x.reshape(-1, kv_heads, width)[:, group] for x in (v, k))
    q = q.reshape(-1, heads, width)
    dt = np.logaddexp(0, u @ w["in_proj.weight"].T + w["dt_bias"])
    y, state = ssd(q, k, v, dt, -np.exp(w["A_log_bias"]), np.zeros((heads, width, width)))
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * w["g_norm.weight"]
    y = y.reshape(len(u), -1) * silu(u @ w["g_proj.weight"].T)
    return y @ w["o_proj.weight"].T, state
