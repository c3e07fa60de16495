"""Linear attention in Triton: a prompt, a part of one or one token in one pass. Specification: reference.py.

A program owns the queries of one head and a block of value columns, and walks them in chunks, as the reference does.
The state stays on the chip; features are made there of the tiles that are read anyway, and never leave it. Where
queries read in both directions, it walks the keys first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunks import (
    bounds,
    decayed,
    features,
    gates,
    in_window,
    last,
    linear_stop,
    load,
    mapped,
    places,
    product,
    store,
    weight,
)


@triton.jit(do_not_specialize=["T", "S", "extra", "tiles", "late"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, near_q_ptr, near_k_ptr, out_ptr, q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr, gate_ptr,
    rank_ptr, window_factor_ptr, linear_factor_ptr, state_ptr, new_state_ptr, total_ptr, far_ptr, largest_ptr, top_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_nb, stride_nh, stride_nt, stride_mb, stride_mh, stride_ms, stride_ob, stride_oh, stride_ot,
    T, S, extra, tiles, late, scale, feature_scale, eps,
    H: tl.constexpr, K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, NEAR_GROUP: tl.constexpr,
    QW_GROUP: tl.constexpr, KW_GROUP: tl.constexpr, STATE_GROUP: tl.constexpr, GATE_GROUP: tl.constexpr,
    GATES: tl.constexpr, KIND: tl.constexpr, BOTH: tl.constexpr, Q_MAPPED: tl.constexpr, K_MAPPED: tl.constexpr,
    WINDOW: tl.constexpr, TERRACED: tl.constexpr, OVERLAP: tl.constexpr, CAUSAL: tl.constexpr,
    NORMALISE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of keys are at hand for a chunk: those that some of its queries may read by softmax, and its own;
    the last `late` of them are not in the state yet. The first `extra` of the S tokens are not among the keys that are
    read linearly.

    `plus` and `minus` are the state of both halves of the features; without BOTH there is the first alone.
    """
    batch, head = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    K: tl.constexpr = 2 * F if BOTH else F
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // K_GROUP * stride_kh - extra * stride_ks
    v_ptr += batch * stride_vb + head // V_GROUP * stride_vh
    columns, features_at = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    lanes, past = tl.arange(0, BLOCK_T), S - T
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    # A gate holds the tokens that k holds.
    gate_row = (batch * (H // GATE_GROUP) + head // GATE_GROUP) * (S - extra) - extra
    q_head, k_head = head // QW_GROUP, head // KW_GROUP
    q_weight = weight(q_weight_ptr, q_head, D, F, BLOCK_D, BLOCK_F, UPCAST)
    k_weight = weight(k_weight_ptr, k_head, D, F, BLOCK_D, BLOCK_F, UPCAST)
    window_factor = tl.load(window_factor_ptr + head) if WINDOW else 0.0
    linear_factor = tl.load(linear_factor_ptr + head)

    plus = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
    plus_sum = tl.zeros([BLOCK_F], tl.float32)
    minus, minus_sum = plus, plus_sum
    state_row = (batch * (H // STATE_GROUP) + head // STATE_GROUP) * K
    if state_ptr is not None:
        given = state_ptr + state_row * (DV + 1)
        plus = load(given, features_at, DV + 1, values, features_at < F, DV, False)
        plus_sum = tl.load(given + features_at * (DV + 1) + DV, mask=features_at < F, other=0.0)
        if BOTH:
            given += F * (DV + 1)
            minus = load(given, features_at, DV + 1, values, features_at < F, DV, False)
            minus_sum = tl.load(given + features_at * (DV + 1) + DV, mask=features_at < F, other=0.0)
    absorbed, leaving = 0, 0
    if CAUSAL:
        absorbed, leaving = bounds(rank_ptr, batch, past, S, WINDOW, TERRACED, OVERLAP)
    else:
        for start in range(0, S, BLOCK_T):
            base = tl.cast(start, tl.int64)
            due = places(rank_ptr, batch, start + lanes, start + lanes < S, S) >= 0
            k = load(k_ptr + base * stride_ks, lanes, stride_ks, columns, due, D, UPCAST)
            v = load(v_ptr + base * stride_vs, lanes, stride_vs, values, due, DV, UPCAST)
            z = mapped(k, k_weight, k_bias_ptr, k_head, F, BLOCK_F, PRECISION, K_MAPPED)
            phi_k = features(z, due, KIND, F, BLOCK_F)
            plus = tl.dot(tl.trans(phi_k.to(v.dtype)), v, acc=plus, input_precision=PRECISION)
            plus_sum += tl.sum(phi_k, 0)
            if BOTH:
                phi_k = features(-z, due, KIND, F, BLOCK_F)
                minus = tl.dot(tl.trans(phi_k.to(v.dtype)), v, acc=minus, input_precision=PRECISION)
                minus_sum += tl.sum(phi_k, 0)

    for start in range(0, T, BLOCK_T):
        rows = start + lanes
        inside = rows < T
        q = load(q_ptr + tl.cast(start, tl.int64) * stride_qt, lanes, stride_qt, columns, inside, D, UPCAST)
        z_q = mapped(q, q_weight, q_bias_ptr, q_head, F, BLOCK_F, PRECISION, Q_MAPPED)
        place, shown = rows, inside
        if CAUSAL:
            place = places(rank_ptr, batch, past + rows, inside, S)
            shown = place >= 0
        # One half of the features after the other, and made anew where they are needed: both would not fit.
        phi_q = features(z_q, shown, KIND, F, BLOCK_F) * feature_scale
        if GATES:
            decay_plus = gates(gate_ptr, gate_row, past + rows, shown, GATES, 0, BLOCK_F, F)
            phi_q *= tl.exp(decay_plus)
        acc = product(phi_q, plus, dtype, PRECISION, UPCAST)
        total = tl.sum(phi_q * plus_sum[None, :], 1)
        if BOTH:
            phi_q = features(-z_q, shown, KIND, F, BLOCK_F) * feature_scale
            if GATES:
                decay_minus = gates(gate_ptr, gate_row, past + rows, shown, GATES, F, BLOCK_F, F)
                phi_q *= tl.exp(decay_minus)
            acc += product(phi_q, minus, dtype, PRECISION, UPCAST)
            total += tl.sum(phi_q * minus_sum[None, :], 1)
        if CAUSAL:
            stop = linear_stop(place, WINDOW, TERRACED, OVERLAP)
            for tile in range(late):
                base = tl.cast(past + start - (late - 1 - tile) * BLOCK_T, tl.int64)
                there = (base + lanes).to(tl.int32)
                real = (there >= extra) & (there < S)
                key = places(rank_ptr, batch, there, real, S)
                k = load(k_ptr + base * stride_ks, lanes, stride_ks, columns, real, D, UPCAST)
                v = load(v_ptr + base * stride_vs, lanes, stride_vs, values, real, DV, UPCAST)
                z = mapped(k, k_weight, k_bias_ptr, k_head, F, BLOCK_F, PRECISION, K_MAPPED)
                fresh = key >= absorbed
                phi_q = features(z_q, shown, KIND, F, BLOCK_F) * feature_scale
                phi_k = features(z, fresh, KIND, F, BLOCK_F)
                if GATES > 1:
                    weights = decayed(phi_q, phi_k, decay_plus, BLOCK_T)
                else:
                    weights = tl.dot(phi_q.to(v.dtype), tl.trans(phi_k.to(v.dtype)), input_precision=PRECISION)
                if BOTH:
                    phi_q = features(-z_q, shown, KIND, F, BLOCK_F) * feature_scale
                    phi_k = features(-z, fresh, KIND, F, BLOCK_F)
                    if GATES > 1:
                        weights += decayed(phi_q, phi_k, decay_minus, BLOCK_T)
                    else:
                        weights = tl.dot(phi_q.to(v.dtype), tl.trans(phi_k.to(v.dtype)), acc=weights,
                                         input_precision=PRECISION)  # fmt: skip
                if GATES == 1:
                    upto = tl.max(decay_plus, 1)  # all columns are alike
                    weights *= tl.exp(tl.minimum(upto[:, None] - upto[None, :], 0.0))
                weights = tl.where(key[None, :] < stop[:, None], weights, 0.0)
                acc = tl.dot(weights.to(v.dtype), v, acc=acc, input_precision=PRECISION)
                total += tl.sum(weights, 1)
        far = total
        total *= linear_factor
        acc *= linear_factor
        if WINDOW:
            near_q = load(near_q_ptr + batch * stride_nb + head * stride_nh + tl.cast(start, tl.int64) * stride_nt,
                          lanes, stride_nt, columns, inside, D, UPCAST)  # fmt: skip
            near_keys = near_k_ptr + batch * stride_mb + head // NEAR_GROUP * stride_mh
            near = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
            near_sum = tl.zeros([BLOCK_T], tl.float32)
            largest = near_sum - float("inf")
            top = tl.zeros([BLOCK_T], tl.int32)
            for tile in range(tiles):
                base = tl.cast(past + start - (tiles - 1 - tile) * BLOCK_T, tl.int64)
                there = (base + lanes).to(tl.int32)
                real = (there >= 0) & (there < S)
                key = places(rank_ptr, batch, there, real, S)
                near_k = load(near_keys + base * stride_ms, lanes, stride_ms, columns, real, D, UPCAST)
                v = load(v_ptr + base * stride_vs, lanes, stride_vs, values, real, DV, UPCAST)
                scores = tl.dot(near_q, tl.trans(near_k), input_precision=PRECISION) * (scale * 1.4426950408889634)
                scores = tl.where(in_window(place, key, WINDOW, TERRACED), scores, float("-inf"))
                if top_ptr is None:
                    tile_largest = tl.max(scores, 1)
                else:
                    tile_largest, tile_top = tl.max(scores, 1, return_indices=True)
                    top = tl.where(tile_largest > largest, base.to(tl.int32) + tile_top, top)
                new_largest = tl.maximum(largest, tile_largest)
                safe = tl.where(new_largest == float("-inf"), 0.0, new_largest)
                shares, shrink = tl.exp2(scores - safe[:, None]), tl.exp2(largest - safe)
                near = tl.dot(shares.to(v.dtype), v, acc=near * shrink[:, None], input_precision=PRECISION)
                near_sum, largest = near_sum * shrink + tl.sum(shares, 1), new_largest
            # The window's weights are relative to its own maximum alone, so that both parts meet only now.
            total += near_sum * window_factor
            acc += near * window_factor
        if NORMALISE:
            total += eps
            acc /= total[:, None]
        written = out_ptr + batch * stride_ob + head * stride_oh + tl.cast(start, tl.int64) * stride_ot
        store(written, lanes, stride_ot, values, inside, acc, DV)
        if total_ptr is not None and tl.program_id(1) == 0:
            row_at = (batch * H + head) * T + rows
            tl.store(total_ptr + row_at, total, mask=inside)
            if WINDOW:
                tl.store(far_ptr + row_at, far, mask=inside)
                tl.store(largest_ptr + row_at, largest, mask=inside)
                tl.store(top_ptr + row_at, top, mask=inside)

        # What no later query has in its window goes into the state: one tile, and after the last chunk all that is due.
        if CAUSAL:
            ended = start + BLOCK_T >= T
            for tile in range(tl.where(ended, late, 1)):
                base = tl.cast(past + start - (late - 1 - tile) * BLOCK_T, tl.int64)
                there = (base + lanes).to(tl.int32)
                key = places(rank_ptr, batch, there, (there >= extra) & (there < S), S)
                due = (key >= absorbed) & ((key < leaving) | (not ended))
                k = load(k_ptr + base * stride_ks, lanes, stride_ks, columns, due, D, UPCAST)
                v = load(v_ptr + base * stride_vs, lanes, stride_vs, values, due, DV, UPCAST)
                z = mapped(k, k_weight, k_bias_ptr, k_head, F, BLOCK_F, PRECISION, K_MAPPED)
                phi_k = features(z, due, KIND, F, BLOCK_F)
                if GATES:
                    end = last(decay_plus, BLOCK_T)
                    phi_k *= tl.exp(end[None, :] - decay_plus)
                    plus, plus_sum = plus * tl.exp(end)[:, None], plus_sum * tl.exp(end)
                plus = tl.dot(tl.trans(phi_k.to(v.dtype)), v, acc=plus, input_precision=PRECISION)
                plus_sum += tl.sum(phi_k, 0)
                if BOTH:
                    phi_k = features(-z, due, KIND, F, BLOCK_F)
                    if GATES:
                        end = last(decay_minus, BLOCK_T)
                        phi_k *= tl.exp(end[None, :] - decay_minus)
                        minus, minus_sum = minus * tl.exp(end)[:, None], minus_sum * tl.exp(end)
                    minus = tl.dot(tl.trans(phi_k.to(v.dtype)), v, acc=minus, input_precision=PRECISION)
                    minus_sum += tl.sum(phi_k, 0)

    if head % STATE_GROUP == 0:
        mine = new_state_ptr + (state_row + features_at) * (DV + 1)
        mask = (features_at < F)[:, None] & (values < DV)[None, :]
        tl.store(mine[:, None] + values[None, :], plus, mask=mask)
        if BOTH:
            tl.store(mine[:, None] + F * (DV + 1) + values[None, :], minus, mask=mask)
        if tl.program_id(1) == 0:
            tl.store(mine + DV, plus_sum, mask=features_at < F)
            if BOTH:
                tl.store(mine + F * (DV + 1) + DV, minus_sum, mask=features_at < F)
