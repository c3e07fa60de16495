"""The gradients of linear attention in Triton. Specification: autograd through reference.py.

With the weight w(n, j) of key j for query n and u(n) = (d_out(n), -d_out(n).out(n)) / total(n), the gradient of w(n, j)
is u(n).(v_j, 1). So the gradient of a query's features is the state that it read times u, made anew by walking the
tokens as the forward pass does; that of a key's features and values is the state's gradient, which walks back.

A program walks one head and one half of the features, whose gradients add up, so that nothing of the size of the
features is kept but the gradient of a gate that has it. What the softmax window adds needs no walk: a program owns a
tile of queries or of keys, and adds its part to what the walks wrote. Every sum has one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunks import (
    bounds,
    decayed,
    decayed_key_gradient,
    decayed_query_gradient,
    features,
    features_gradient,
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


@triton.jit
def slope_kernel(
    out_ptr, d_out_ptr, total_ptr, slope_ptr, stride_ob, stride_oh, stride_ot, stride_db, stride_dh, stride_dt, T,
    H: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The gradient of each query's total."""
    batch, head = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    values, inside = tl.arange(0, BLOCK_V), rows < T
    out = load(out_ptr + batch * stride_ob + head * stride_oh, rows, stride_ot, values, inside, DV, True)
    d_out = load(d_out_ptr + batch * stride_db + head * stride_dh, rows, stride_dt, values, inside, DV, True)
    row_at = (batch * H + head) * T + rows
    total = tl.load(total_ptr + row_at, mask=inside, other=1.0)
    tl.store(slope_ptr + row_at, -tl.sum(out * d_out, 1) / total, mask=inside)


@triton.jit
def _upstream(total_ptr, slope_ptr, row_at, inside, NORMALISE: tl.constexpr):
    """What d_out is multiplied by, and the gradient of the total, of each query."""
    if NORMALISE:
        share = tl.where(inside, 1.0 / tl.load(total_ptr + row_at, mask=inside, other=1.0), 0.0)
        slope = tl.load(slope_ptr + row_at, mask=inside, other=0.0)
    else:
        share = tl.where(inside, 1.0, 0.0)
        slope = tl.zeros_like(share)
    return share, slope


@triton.jit(do_not_specialize=["T", "S", "extra", "late"])
def queries_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr, gate_ptr, rank_ptr,
    linear_factor_ptr, state_ptr, total_ptr, slope_ptr, dq_ptr, d_weight_ptr, d_bias_ptr, d_gate_ptr, taken_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_db, stride_dh, stride_dt, T, S, extra, late, feature_scale,
    H: tl.constexpr, K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, QW_GROUP: tl.constexpr, KW_GROUP: tl.constexpr,
    STATE_GROUP: tl.constexpr, GATE_GROUP: tl.constexpr, GATES: tl.constexpr, KIND: tl.constexpr, HALVES: tl.constexpr,
    Q_MAPPED: tl.constexpr, K_MAPPED: tl.constexpr, WINDOW: tl.constexpr, TERRACED: tl.constexpr,
    OVERLAP: tl.constexpr, CAUSAL: tl.constexpr, NORMALISE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Walk one head's queries with one half of the state: dq, its map's gradient, and what queries add to those of a
    gate and of the linear factor."""
    batch, head = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    half = tl.program_id(1)
    sign = 1.0 - 2.0 * half
    K: tl.constexpr = HALVES * F
    mine = (half * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)  # of the buffers that every half has
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // K_GROUP * stride_kh - extra * stride_ks
    v_ptr += batch * stride_vb + head // V_GROUP * stride_vh
    d_out_ptr += batch * stride_db + head * stride_dh
    columns, features_at, values = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_V)
    lanes, past = tl.arange(0, BLOCK_T), S - T
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    gate_row = (batch * (H // GATE_GROUP) + head // GATE_GROUP) * (S - extra) - extra
    q_head, k_head = head // QW_GROUP, head // KW_GROUP
    q_weight = weight(q_weight_ptr, q_head, D, F, BLOCK_D, BLOCK_F, UPCAST)
    k_weight = weight(k_weight_ptr, k_head, D, F, BLOCK_D, BLOCK_F, UPCAST)
    linear_factor = tl.load(linear_factor_ptr + head)
    if Q_MAPPED:
        d_weight = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    d_bias = tl.zeros([BLOCK_F], tl.float32)

    state = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
    state_sum = tl.zeros([BLOCK_F], tl.float32)
    if state_ptr is not None:
        given = state_ptr + ((batch * (H // STATE_GROUP) + head // STATE_GROUP) * K + half * F) * (DV + 1)
        state = load(given, features_at, DV + 1, values, features_at < F, DV, False)
        state_sum = tl.load(given + features_at * (DV + 1) + DV, mask=features_at < F, other=0.0)
    absorbed = 0
    if CAUSAL:
        absorbed, _ = bounds(rank_ptr, batch, past, S, WINDOW, TERRACED, OVERLAP)
    else:
        for start in range(0, S, BLOCK_T):
            base = tl.cast(start, tl.int64)
            due = places(rank_ptr, batch, start + lanes, start + lanes < S, S) >= 0
            k = load(k_ptr + base * stride_ks, lanes, stride_ks, columns, due, D, UPCAST)
            v = load(v_ptr + base * stride_vs, lanes, stride_vs, values, due, DV, UPCAST)
            z = mapped(k, k_weight, k_bias_ptr, k_head, F, BLOCK_F, PRECISION, K_MAPPED)
            phi_k = features(sign * z, due, KIND, F, BLOCK_F)
            state = tl.dot(tl.trans(phi_k.to(v.dtype)), v, acc=state, input_precision=PRECISION)
            state_sum += tl.sum(phi_k, 0)

    for start in range(0, T, BLOCK_T):
        rows = start + lanes
        inside = rows < T
        place = rows
        if CAUSAL:
            place = places(rank_ptr, batch, past + rows, inside, S)
        step = tl.cast(start, tl.int64)
        row_at = (batch * H + head) * T + rows
        shown = inside & (place >= 0)
        share, slope = _upstream(total_ptr, slope_ptr, row_at, shown, NORMALISE)
        d_out = load(d_out_ptr + step * stride_dt, lanes, stride_dt, values, inside, DV, UPCAST)
        d_phi = product(d_out, tl.trans(state), dtype, PRECISION, UPCAST) * share[:, None]
        d_phi += slope[:, None] * state_sum[None, :]
        if GATES:
            decay = gates(gate_ptr, gate_row, past + rows, shown, GATES, half * F, BLOCK_F, F)
            d_phi *= tl.exp(decay)
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
                phi_k = features(sign * z, key >= absorbed, KIND, F, BLOCK_F)
                pairs = tl.dot(d_out, tl.trans(v), input_precision=PRECISION) * share[:, None] + slope[:, None]
                pairs = tl.where(key[None, :] < stop[:, None], pairs, 0.0)
                if GATES > 1:
                    d_phi += decayed_query_gradient(pairs, phi_k, decay, BLOCK_T)
                else:
                    if GATES == 1:
                        upto = tl.max(decay, 1)  # all columns are alike
                        pairs *= tl.exp(tl.minimum(upto[:, None] - upto[None, :], 0.0))
                    d_phi += product(pairs, phi_k, dtype, PRECISION, UPCAST)
        q = load(q_ptr + step * stride_qt, lanes, stride_qt, columns, inside, D, UPCAST)
        z_q = sign * mapped(q, q_weight, q_bias_ptr, q_head, F, BLOCK_F, PRECISION, Q_MAPPED)
        phi_q = features(z_q, inside, KIND, F, BLOCK_F)
        taken = phi_q * d_phi * feature_scale
        taken_sum = tl.sum(taken, 1)
        tl.store(taken_ptr + mine * T + rows, taken_sum, mask=inside)
        if GATES == 1:
            at = mine * (S - extra) + (past - extra) + rows
            tl.store(d_gate_ptr + at, taken_sum * linear_factor, mask=inside)
        elif GATES:
            at = ((batch * H + head) * (S - extra) + (past - extra) + start) * K + half * F
            store(d_gate_ptr + at, lanes, K, features_at, inside, taken * linear_factor, F)
        d_phi *= feature_scale * linear_factor
        d_z = sign * features_gradient(z_q, phi_q, d_phi, inside, KIND, F, BLOCK_F)
        if q_bias_ptr is not None:
            d_bias += tl.sum(d_z, 0)
        if Q_MAPPED:
            d_weight += product(tl.trans(q), d_z, dtype, PRECISION, UPCAST)
            d_z = product(d_z, tl.trans(q_weight), dtype, PRECISION, UPCAST)
        store(dq_ptr + (mine * T + start) * D, lanes, D, columns, inside, d_z, D)

        if CAUSAL:  # the last chunk's keys are not read anymore
            base = tl.cast(past + start - (late - 1) * BLOCK_T, tl.int64)
            there = (base + lanes).to(tl.int32)
            due = places(rank_ptr, batch, there, (there >= extra) & (there < S), S) >= absorbed
            k = load(k_ptr + base * stride_ks, lanes, stride_ks, columns, due, D, UPCAST)
            v = load(v_ptr + base * stride_vs, lanes, stride_vs, values, due, DV, UPCAST)
            z = mapped(k, k_weight, k_bias_ptr, k_head, F, BLOCK_F, PRECISION, K_MAPPED)
            phi_k = features(sign * z, due, KIND, F, BLOCK_F)
            if GATES:
                end = last(decay, BLOCK_T)
                phi_k *= tl.exp(end[None, :] - decay)
                state, state_sum = state * tl.exp(end)[:, None], state_sum * tl.exp(end)
            state = tl.dot(tl.trans(phi_k.to(v.dtype)), v, acc=state, input_precision=PRECISION)
            state_sum += tl.sum(phi_k, 0)

    if Q_MAPPED:
        store(d_weight_ptr + mine * D * F, columns, F, features_at, columns < D, d_weight, F)
    if q_bias_ptr is not None:
        tl.store(d_bias_ptr + mine * F + features_at, d_bias, mask=features_at < F)


@triton.jit(do_not_specialize=["T", "S", "extra", "late"])
def keys_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr, gate_ptr, rank_ptr,
    linear_factor_ptr, new_state_ptr, total_ptr, slope_ptr, d_new_state_ptr, dk_ptr, dv_ptr, d_weight_ptr, d_bias_ptr,
    d_gate_ptr, d_state_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_db, stride_dh, stride_dt, T, S, extra, late, feature_scale,
    H: tl.constexpr, K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, QW_GROUP: tl.constexpr, KW_GROUP: tl.constexpr,
    STATE_GROUP: tl.constexpr, GATE_GROUP: tl.constexpr, GATES: tl.constexpr, KIND: tl.constexpr, HALVES: tl.constexpr,
    Q_MAPPED: tl.constexpr, K_MAPPED: tl.constexpr, WINDOW: tl.constexpr, TERRACED: tl.constexpr,
    OVERLAP: tl.constexpr, CAUSAL: tl.constexpr, NORMALISE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Walk one head's keys back with the gradient of one half of the state: dk, dv, the map's gradient, the gate's."""
    batch, head = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    half = tl.program_id(1)
    sign = 1.0 - 2.0 * half
    K: tl.constexpr = HALVES * F
    mine = (half * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // K_GROUP * stride_kh - extra * stride_ks
    v_ptr += batch * stride_vb + head // V_GROUP * stride_vh
    d_out_ptr += batch * stride_db + head * stride_dh
    columns, features_at, values = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_V)
    lanes, past = tl.arange(0, BLOCK_T), S - T
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    gate_row = (batch * (H // GATE_GROUP) + head // GATE_GROUP) * (S - extra) - extra
    q_head, k_head = head // QW_GROUP, head // KW_GROUP
    q_weight = weight(q_weight_ptr, q_head, D, F, BLOCK_D, BLOCK_F, UPCAST)
    k_weight = weight(k_weight_ptr, k_head, D, F, BLOCK_D, BLOCK_F, UPCAST)
    factor = tl.load(linear_factor_ptr + head) * feature_scale
    if K_MAPPED:
        d_weight = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    d_bias = tl.zeros([BLOCK_F], tl.float32)

    # A state that heads share takes its gradient through the first of them.
    given = ((batch * (H // STATE_GROUP) + head // STATE_GROUP) * K + half * F) * (DV + 1)
    state_mask = features_at < tl.where(head % STATE_GROUP == 0, F, 0)
    d_state = load(d_new_state_ptr + given, features_at, DV + 1, values, state_mask, DV, False)
    d_sum = tl.load(d_new_state_ptr + given + features_at * (DV + 1) + DV, mask=state_mask, other=0.0)
    later = tl.zeros([BLOCK_F], tl.float32)  # the gradient of a gate from all that comes after it
    if GATES:
        ended = load(new_state_ptr + given, features_at, DV + 1, values, state_mask, DV, False)
        ended_sum = tl.load(new_state_ptr + given + features_at * (DV + 1) + DV, mask=state_mask, other=0.0)
        later = tl.sum(ended * d_state, 1) + ended_sum * d_sum
    absorbed, leaving = 0, 0
    if CAUSAL:
        absorbed, leaving = bounds(rank_ptr, batch, past, S, WINDOW, TERRACED, OVERLAP)
        first = -tl.maximum(tl.cdiv(past, BLOCK_T), late - 1)  # the first tile of keys, counted from the first query's
        steps = tl.cdiv(T, BLOCK_T) - first
    else:
        first, past = 0, 0
        steps = tl.cdiv(S, BLOCK_T)
        for start in range(0, T, BLOCK_T):
            inside = start + lanes < T
            row_at = (batch * H + head) * T + start + lanes
            step = tl.cast(start, tl.int64)
            share, slope = _upstream(total_ptr, slope_ptr, row_at, inside, NORMALISE)
            q = load(q_ptr + step * stride_qt, lanes, stride_qt, columns, inside, D, UPCAST)
            d_out = load(d_out_ptr + step * stride_dt, lanes, stride_dt, values, inside, DV, UPCAST)
            z_q = mapped(q, q_weight, q_bias_ptr, q_head, F, BLOCK_F, PRECISION, Q_MAPPED)
            phi_q = features(sign * z_q, inside, KIND, F, BLOCK_F) * factor
            d_state += product(tl.trans(phi_q * share[:, None]), d_out, dtype, PRECISION, UPCAST)
            d_sum += tl.sum(phi_q * slope[:, None], 0)

    for step in range(steps):
        tile_at = first + steps - 1 - step
        base = tl.cast(past + tile_at * BLOCK_T, tl.int64)
        there = (base + lanes).to(tl.int32)
        real = (there >= extra) & (there < S)
        key = places(rank_ptr, batch, there, real, S)
        fresh, due = key >= absorbed, (key >= absorbed) & (key < leaving)
        if not CAUSAL:
            due = fresh
        k = load(k_ptr + base * stride_ks, lanes, stride_ks, columns, real, D, UPCAST)
        v = load(v_ptr + base * stride_vs, lanes, stride_vs, values, real, DV, UPCAST)
        z = sign * mapped(k, k_weight, k_bias_ptr, k_head, F, BLOCK_F, PRECISION, K_MAPPED)
        phi_k = features(z, fresh, KIND, F, BLOCK_F)
        d_phi = product(v, tl.trans(d_state), dtype, PRECISION, UPCAST) + d_sum[None, :]
        d_phi = tl.where(due[:, None], d_phi, 0.0)
        read = tl.where(due[:, None], phi_k, 0.0)
        if GATES:
            decay = gates(gate_ptr, gate_row, there, key >= 0, GATES, half * F, BLOCK_F, F)
            end = last(decay, BLOCK_T)
            to_end = tl.exp(end[None, :] - decay)
            d_phi, read = d_phi * to_end, read * to_end
        dv = product(read, d_state, dtype, PRECISION, UPCAST)
        if CAUSAL:
            phi_q, share = tl.zeros_like(phi_k), tl.zeros([BLOCK_T], tl.float32)
            slope, d_out = share, load(d_out_ptr, lanes, stride_dt, values, lanes < 0, DV, UPCAST)
            for tile in range(late):
                start = (tile_at + tile) * BLOCK_T
                rows = start + lanes
                inside = (rows >= 0) & (rows < T)
                place = places(rank_ptr, batch, past + rows, inside, S)
                row_at = (batch * H + head) * T + rows
                at = tl.cast(start, tl.int64)
                share, slope = _upstream(total_ptr, slope_ptr, row_at, inside & (place >= 0), NORMALISE)
                q = load(q_ptr + at * stride_qt, lanes, stride_qt, columns, inside, D, UPCAST)
                d_out = load(d_out_ptr + at * stride_dt, lanes, stride_dt, values, inside, DV, UPCAST)
                z_q = mapped(q, q_weight, q_bias_ptr, q_head, F, BLOCK_F, PRECISION, Q_MAPPED)
                phi_q = features(sign * z_q, inside, KIND, F, BLOCK_F) * factor
                far = key[None, :] < linear_stop(place, WINDOW, TERRACED, OVERLAP)[:, None]
                pairs = tl.dot(d_out, tl.trans(v), input_precision=PRECISION) * share[:, None] + slope[:, None]
                pairs = tl.where(far & fresh[None, :], pairs, 0.0)
                if GATES > 1:
                    weights = decayed(phi_q, phi_k, decay, BLOCK_T)
                    d_phi += decayed_key_gradient(pairs, phi_q, decay, BLOCK_T)
                else:
                    weights = tl.dot(phi_q.to(v.dtype), tl.trans(phi_k.to(v.dtype)), input_precision=PRECISION)
                    if GATES == 1:
                        upto = tl.max(decay, 1)
                        between = tl.exp(tl.minimum(upto[:, None] - upto[None, :], 0.0))
                        weights, pairs = weights * between, pairs * between
                    d_phi += product(tl.trans(pairs), phi_q, dtype, PRECISION, UPCAST)
                weights = tl.where(far, weights, 0.0) * share[:, None]
                dv += product(tl.trans(weights), d_out, dtype, PRECISION, UPCAST)
            # No earlier key is at hand for the last of these chunks.
            if GATES:
                phi_q *= tl.exp(decay)
                d_state, d_sum = d_state * tl.exp(end)[:, None], d_sum * tl.exp(end)
            d_state += product(tl.trans(phi_q * share[:, None]), d_out, dtype, PRECISION, UPCAST)
            d_sum += tl.sum(phi_q * slope[:, None], 0)
        if GATES == 1:
            at = mine * (S - extra) - extra + there
            change = tl.load(d_gate_ptr + at, mask=real, other=0.0) - tl.sum(phi_k * d_phi, 1)
            total = tl.sum(later, 0) + tl.sum(change, 0)
            tl.store(d_gate_ptr + at, tl.where(key >= 0, total - tl.cumsum(change, 0) + change, 0.0), mask=real)
            later = tl.where(features_at == 0, total, 0.0)
        elif GATES:
            at = ((batch * H + head) * (S - extra) - extra + base) * K + half * F
            change = load(d_gate_ptr + at, lanes, K, features_at, real, F, False) - phi_k * d_phi
            later += tl.sum(change, 0)
            found = tl.where((key >= 0)[:, None], later[None, :] - tl.cumsum(change, 0) + change, 0.0)
            store(d_gate_ptr + at, lanes, K, features_at, real, found, F)
        d_z = sign * features_gradient(z, phi_k, d_phi, fresh, KIND, F, BLOCK_F)
        if k_bias_ptr is not None:
            d_bias += tl.sum(d_z, 0)
        if K_MAPPED:
            d_weight += product(tl.trans(k), d_z, dtype, PRECISION, UPCAST)
            d_z = product(d_z, tl.trans(k_weight), dtype, PRECISION, UPCAST)
        store(dk_ptr + (mine * (S - extra) - extra + base) * D, lanes, D, columns, real, d_z, D)
        store(dv_ptr + (mine * S + base) * DV, lanes, DV, values, (there >= 0) & (there < S), dv, DV)

    if d_state_ptr is not None:
        found = d_state_ptr + ((batch * H + head) * K + half * F) * (DV + 1)
        store(found, features_at, DV + 1, values, features_at < F, d_state, DV)
        tl.store(found + features_at * (DV + 1) + DV, d_sum, mask=features_at < F)
    if K_MAPPED:
        store(d_weight_ptr + mine * D * F, columns, F, features_at, columns < D, d_weight, F)
    if k_bias_ptr is not None:
        tl.store(d_bias_ptr + mine * F + features_at, d_bias, mask=features_at < F)


@triton.jit(do_not_specialize=["T", "S", "tiles"])
def window_queries_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, rank_ptr, window_factor_ptr, linear_factor_ptr, total_ptr, slope_ptr, largest_ptr,
    top_ptr, shift_ptr, far_ptr, taken_ptr, dq_ptr, d_window_ptr, d_linear_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_db, stride_dh, stride_dt, T, S, tiles, scale,
    H: tl.constexpr, K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, HALVES: tl.constexpr, WINDOW: tl.constexpr,
    TERRACED: tl.constexpr, ADD: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries through their windows, added to what is there with ADD; the gradients of both factors."""
    batch, head = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    start = tl.program_id(1) * BLOCK_T
    columns, values, lanes = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_T)
    past, rows = S - T, start + lanes
    inside, step = rows < T, tl.cast(start, tl.int64)
    row_at = (batch * H + head) * T + rows
    k_ptr += batch * stride_kb + head // K_GROUP * stride_kh
    v_ptr += batch * stride_vb + head // V_GROUP * stride_vh
    place = places(rank_ptr, batch, past + rows, inside, S)
    q = load(q_ptr + batch * stride_qb + head * stride_qh + step * stride_qt, lanes, stride_qt, columns, inside, D,
             UPCAST)  # fmt: skip
    d_out = load(d_out_ptr + batch * stride_db + head * stride_dh + step * stride_dt, lanes, stride_dt, values, inside,
                 DV, UPCAST)  # fmt: skip
    share, slope = _upstream(total_ptr, slope_ptr, row_at, inside & (place >= 0), True)
    largest = tl.load(largest_ptr + row_at, mask=inside, other=0.0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    factor = tl.load(window_factor_ptr + head)
    near_sum = tl.zeros([BLOCK_T], tl.float32)
    dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    shift = tl.zeros([BLOCK_T], tl.float32)
    for tile in range(tiles):
        base = tl.cast(past + start - (tiles - 1 - tile) * BLOCK_T, tl.int64)
        there = (base + lanes).to(tl.int32)
        real = (there >= 0) & (there < S)
        key = places(rank_ptr, batch, there, real, S)
        k = load(k_ptr + base * stride_ks, lanes, stride_ks, columns, real, D, UPCAST)
        v = load(v_ptr + base * stride_vs, lanes, stride_vs, values, real, DV, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634)
        weights = tl.exp2(tl.where(in_window(place, key, WINDOW, TERRACED), scores - largest[:, None], float("-inf")))
        pairs = tl.dot(d_out, tl.trans(v), input_precision=PRECISION) * share[:, None] + slope[:, None]
        d_scores = weights * pairs
        near_sum += tl.sum(weights, 1)
        shift += tl.sum(d_scores, 1)
        dq += product(d_scores, k, v_ptr.dtype.element_ty, PRECISION, UPCAST)
    # All weights are relative to the largest, which therefore takes what they give.
    top = tl.load(top_ptr + row_at, mask=inside, other=0)
    seen = inside & (place >= 0)
    k = tl.load(k_ptr + top.to(tl.int64)[:, None] * stride_ks + columns[None, :],
                mask=seen[:, None] & (columns < D)[None, :], other=0.0)  # fmt: skip
    dq -= shift[:, None] * k.to(tl.float32)
    tl.store(shift_ptr + row_at, shift * factor, mask=inside)
    # The total's gradient once more, from unrounded parts of the output: in the factors' gradients most of it cancels.
    far = tl.load(far_ptr + row_at, mask=inside, other=0.0)
    taken = tl.load(taken_ptr + row_at, mask=inside, other=0.0)
    if HALVES == 2:
        taken += tl.load(taken_ptr + tl.num_programs(0).to(tl.int64) * T + row_at, mask=inside, other=0.0)
    near_own, far_own = shift - slope * near_sum, taken - slope * far
    slope = -(tl.load(linear_factor_ptr + head) * far_own + factor * near_own) * share
    piece = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(d_window_ptr + piece, tl.sum(near_own + slope * near_sum, 0))
    tl.store(d_linear_ptr + piece, tl.sum(far_own + slope * far, 0))
    dq *= scale * factor
    dq_ptr += (batch * H + head) * T * D + step * D
    if ADD:
        dq += load(dq_ptr, lanes, D, columns, inside, D, False)
    store(dq_ptr, lanes, D, columns, inside, dq, D)


@triton.jit(do_not_specialize=["T", "S", "tiles"])
def window_keys_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, rank_ptr, factor_ptr, total_ptr, slope_ptr, largest_ptr, top_ptr, shift_ptr,
    dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_db, stride_dh, stride_dt, T, S, tiles, scale,
    H: tl.constexpr, K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, WINDOW: tl.constexpr, TERRACED: tl.constexpr,
    ADD: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk, added to what is there with ADD, and dv, which always is, of a tile of keys through windows they are in."""
    batch, head = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    columns, values, lanes = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_T)
    past, base = S - T, tl.program_id(1).to(tl.int64) * BLOCK_T
    there = (base + lanes).to(tl.int32)
    real = there < S
    q_ptr += batch * stride_qb + head * stride_qh
    d_out_ptr += batch * stride_db + head * stride_dh
    key = places(rank_ptr, batch, there, real, S)
    k = load(k_ptr + batch * stride_kb + head // K_GROUP * stride_kh + base * stride_ks, lanes, stride_ks, columns,
             real, D, UPCAST)  # fmt: skip
    v = load(v_ptr + batch * stride_vb + head // V_GROUP * stride_vh + base * stride_vs, lanes, stride_vs, values, real,
             DV, UPCAST)  # fmt: skip
    factor = tl.load(factor_ptr + head)
    dk = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for tile in range(tiles):
        start = base + tile * BLOCK_T - past
        rows = (start + lanes).to(tl.int32)
        inside = (rows >= 0) & (rows < T)
        place = places(rank_ptr, batch, past + rows, inside, S)
        row_at = (batch * H + head) * T + rows
        q = load(q_ptr + start * stride_qt, lanes, stride_qt, columns, inside, D, UPCAST)
        d_out = load(d_out_ptr + start * stride_dt, lanes, stride_dt, values, inside, DV, UPCAST)
        share, slope = _upstream(total_ptr, slope_ptr, row_at, inside & (place >= 0), True)
        largest = tl.load(largest_ptr + row_at, mask=inside, other=0.0)
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        top = tl.load(top_ptr + row_at, mask=inside & (place >= 0), other=-1)
        shift = tl.load(shift_ptr + row_at, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634)
        weights = tl.exp2(tl.where(in_window(place, key, WINDOW, TERRACED), scores - largest[:, None], float("-inf")))
        weights *= factor
        pairs = tl.dot(d_out, tl.trans(v), input_precision=PRECISION) * share[:, None] + slope[:, None]
        d_scores = weights * pairs - tl.where(there[None, :] == top[:, None], shift[:, None], 0.0)
        dk += product(tl.trans(d_scores), q, v_ptr.dtype.element_ty, PRECISION, UPCAST)
        dv += product(tl.trans(weights * share[:, None]), d_out, v_ptr.dtype.element_ty, PRECISION, UPCAST)
    dk *= scale
    dk_ptr += (batch * H + head) * S * D + base * D
    dv_ptr += (batch * H + head) * S * DV + base * DV
    if ADD:
        dk += load(dk_ptr, lanes, D, columns, real, D, False)
    store(dk_ptr, lanes, D, columns, real, dk, D)
    dv += load(dv_ptr, lanes, DV, values, real, DV, False)
    store(dv_ptr, lanes, DV, values, real, dv, DV)
