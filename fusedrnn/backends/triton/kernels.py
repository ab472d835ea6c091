"""A recurrence over T steps as two kernels, forward and BPTT backward, for any cell.

A program owns a tile of ``BLOCK_B`` rows and ``BLOCK_H`` hidden units, has its states in registers,
and runs steps ``first`` to ``last``:

- If it has all units of its rows, their weights stay on chip and h goes from step to step in
  registers.
- Else it reads what the programs of the same rows stored at the step before: h in forward, the
  gates' gradients in backward. Either each launch runs one step, or (``MEETS``) one launch runs
  them all and those programs meet in between, for which all programs must run at once. They also
  meet ``WITHIN`` a step: for each of the ``NORM`` sums over units that layer norm asks for, of
  W_hh h and of the second state, or before the product of the ``LATE`` last gates.

``CELL``, ``OUTPUT`` and ``FIRST`` are the cell's functions of cells/; ``G``, ``S``, ``R`` and ``K``
count its gates, states, saved planes and params. 16 bits are for what is stored and for the
operands of products; everything else is of type ``COMPUTE``. Names begin with what they hold:
``o_`` offsets, ``p_`` pointers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedrnn.backends.triton.meetings import (
    arrive,
    meeting,
    normalised,
    of_normalised,
    store_scale,
    wait,
)
from fusedrnn.backends.triton.tiles import (
    add,
    add_product,
    add_products,
    cuts,
    entering,
    factors_of,
    load_of_units,
    load_planes,
    load_weights,
    multiply,
    operand,
    select,
    shares,
    store_planes,
    tile_of,
    zeros,
)

# For one plan one kernel is compiled, whatever T and B are, and wherever h0 begins in a stack's
# states. An argument must not be called params: what Triton generates to launch a kernel has that
# name itself.
specialised = triton.jit(
    do_not_specialize=["T", "B", "first", "last", "rows_before"],
    do_not_specialize_on_alignment=["h0", "lengths", "resets"],
)


@specialised
def forward(
    gx,  # [T,B,G*H]
    w_t,  # [H,G*H] W_hh transposed
    b_hh,  # [G*H], None if gx has it
    gain,  # [G*H] of W_hh h, or None
    parameters,  # [K,H], two more rows for the gain and bias of a normalised state, or None
    h0,  # [B,H]
    lengths,  # [B] or None
    resets,  # [T,B] or None
    reset_states,  # [S,H] those that enter there, or None: zeros
    dropout,  # [B,H] of type COMPUTE, by which h is multiplied on its way into W_hh, or None
    renew_h,  # [T,B,H] 0 where h keeps the value it had before the step, else 1, or None: rate_h
    renew_c,  # the same of c
    y,  # [T,B,H]
    c,  # [T,B,H] the last state of each step, or None
    h_prev,  # [T,B,H] what entered each step, None in inference as the next two
    c_prev,  # [S-1,T,B,H] of type COMPUTE
    saved,  # [R,T,B,H]
    hats,  # [T,B,G*H] W_hh h normalised, or None as the next two
    hats_of_state,  # [T,B,H]
    scales,  # [2,T,B] of type COMPUTE, one over the deviation of each
    late,  # [T,B,H] what enters the product of the late gates, or None
    states,  # [S,B,H] of type COMPUTE, the ones before step first, then those after the last
    counters,  # [rows of programs] 0, where programs meet
    numbers,  # [NORM,N_H,2,B] of type COMPUTE, what they then tell each other
    rate_h: tl.float64,  # the share of the new value in h
    rate_c: tl.float64,
    T,
    B,
    first,
    last,
    rows_before,  # of programs, in other launches
    CELL: tl.constexpr,
    OUTPUT: tl.constexpr,
    FIRST: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MEETS: tl.constexpr,
    NORM: tl.constexpr,
    LATE: tl.constexpr,
    ZONEOUT: tl.constexpr,
):
    N_H: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    EARLY: tl.constexpr = G - LATE
    WITHIN: tl.constexpr = NORM + 1 if LATE > 0 else NORM
    storage: tl.constexpr = y.dtype.element_ty
    i_b, i_h = rows_before + tl.program_id(0) // N_H, tl.program_id(0) % N_H
    tile = tile_of(i_b, i_h, lengths, T, B, G, H, BLOCK_B, BLOCK_H)
    step = tl.cast(B, tl.int64) * H
    all_steps = T * step
    state = load_planes(states + tile.row * H + tile.plane, step, tile.mask, S, COMPUTE)
    of_units = ()  # what the cell's functions take last
    if K > 0:
        of_units = (load_of_units(parameters, tile, K, H, COMPUTE),)
    if NORM > 1:
        gain_of_state, bias_of_state = load_of_units(parameters + K * H, tile, 2, H, COMPUTE)
    if N_H == 1:
        weights = ()
        for g in tl.static_range(G):
            weights += (load_weights(w_t + g * H, tile.o_h, tile.units, tile, G * H, PRECISION),)
    factors = factors_of(dropout, tile, H)

    for s in range(first, last):
        t = T - 1 - s if REVERSE else s
        i_t = tl.cast(t, tl.int64)
        active = tile.rows & (t < tile.length)
        on = tile.mask & active[:, None]
        p = i_t * step + tile.row * H
        x = load_planes(gx + p * G + tile.gates, H, on, G, COMPUTE)
        anew = cuts(resets, t, T, B, tile, REVERSE)
        entering_anew = zeros(S, BLOCK_B, BLOCK_H, COMPUTE)
        if reset_states is not None:
            entering_anew = load_of_units(reset_states, tile, S, H, COMPUTE)
        state = select(anew, entering_anew, state, S)

        gh = zeros(EARLY, BLOCK_B, BLOCK_H, COMPUTE)
        if N_H == 1:
            h = operand(entering(state[0], factors, storage).to(storage), PRECISION)
            sums = ()
            for g in tl.static_range(EARLY):
                sums += (add_product(gh[g], h, weights[g], PRECISION),)
            gh = sums
        else:
            if MEETS:
                wait(counters + i_b, N_H * (WITHIN + 1) * s)
            # Two loads, not one by chosen pointers, of which Triton knows no alignment.
            p_y = (y + p + step if REVERSE else y + p - step) + tile.o_b * H
            p_h0 = h0 + tile.row * H + tile.o_b * H
            steps_before = tile.length - 1 - t if REVERSE else tl.zeros_like(tile.length) + t
            from_y = active & (anew == 0) & (steps_before > 0)
            from_h0 = active & (anew == 0) & (steps_before == 0)
            for k in range(0, H, BLOCK_K):
                o_k = k + tl.arange(0, BLOCK_K)
                in_k = o_k < H
                k_y, k_h0 = from_y[:, None] & in_k[None, :], from_h0[:, None] & in_k[None, :]
                h = tl.load(p_y[:, None] + o_k[None, :], mask=k_y, other=0)
                first_h = tl.load(p_h0[:, None] + o_k[None, :], mask=k_h0, other=0)
                h = tl.where(from_h0[:, None], first_h, h)
                if reset_states is not None:
                    h_anew = tl.load(reset_states + o_k, mask=in_k, other=0).to(storage)
                    h = tl.where(anew[:, None], h_anew[None, :], h)
                if dropout is not None:
                    p_dropout = dropout + tile.row * H + tile.o_b[:, None] * H + o_k[None, :]
                    k_rows = tile.rows[:, None] & in_k[None, :]
                    factor = tl.load(p_dropout, mask=k_rows, other=0)
                    h = (h.to(COMPUTE) * factor).to(storage)
                h = operand(h, PRECISION)
                sums = ()
                for g in tl.static_range(EARLY):
                    w = load_weights(w_t + g * H, o_k, in_k, tile, G * H, PRECISION)
                    sums += (add_product(gh[g], h, w, PRECISION),)
                gh = sums
        if NORM > 0:
            met = meeting(counters, numbers, i_b, s, 1, B, N_H, WITHIN)
            normal, scale = normalised(gh, met, tile, B, H, BLOCK_H, G)
            gh = multiply(normal, load_of_units(gain, tile, G, H, COMPUTE), G)
            if hats is not None:
                store_planes(hats + p * G + tile.gates, H, normal, active, tile.mask, G)
                store_scale(scales + i_t * B + tile.row, scale, active, tile)
        if b_hh is not None:
            gh = add(gh, load_of_units(b_hh, tile, EARLY, H, COMPUTE), EARLY)
        if LATE > 0:
            h = FIRST(x, gh, state, *of_units) * entering(state[0], factors, storage)
            if late is not None:
                store_planes(late + p + tile.plane, 0, (h,), active, tile.mask, 1)
            of_late = zeros(LATE, BLOCK_B, BLOCK_H, COMPUTE)
            if N_H == 1:
                h = operand(h.to(storage), PRECISION)
                sums = ()
                for g in tl.static_range(LATE):
                    sums += (add_product(of_late[g], h, weights[EARLY + g], PRECISION),)
                of_late = sums
            else:
                arrive(counters + i_b)
                wait(counters + i_b, N_H * ((WITHIN + 1) * s + 1))
                p_late = late + p + tile.o_b * H
                of_late = add_products(
                    of_late, p_late, active, w_t + EARLY * H, tile, G * H, H, H, LATE, PRECISION,
                    BLOCK_K,
                )  # fmt: skip
            if b_hh is not None:
                biases = load_of_units(b_hh + EARLY * H, tile, LATE, H, COMPUTE)
                of_late = add(of_late, biases, LATE)
            gh += of_late

        new, kept = CELL(x, gh, state, *of_units)
        if NORM > 1:
            met = meeting(counters, numbers, i_b, s, 2, B, N_H, WITHIN)
            normal, scale = normalised(new[1:2], met, tile, B, H, BLOCK_H, 1)
            new = (OUTPUT(kept, normal[0] * gain_of_state + bias_of_state),) + new[1:]
            if hats is not None:
                store_planes(hats_of_state + p + tile.plane, 0, normal, active, tile.mask, 1)
                store_scale(scales + (T + i_t) * B + tile.row, scale, active, tile)
        if ZONEOUT:
            of_new = shares(renew_h, renew_c, rate_h, rate_c, p + tile.plane, on, S, COMPUTE)
            zoned = ()
            for n in tl.static_range(min(S, 2)):
                zoned += (of_new[n] * new[n] + (1 - of_new[n]) * state[n],)
            new = zoned + new[2:]
        new = (new[0].to(storage).to(COMPUTE),) + new[1:]
        store_planes(y + p + tile.plane, 0, new, active, tile.mask, 1)
        if MEETS:
            arrive(counters + i_b)
        if c is not None:
            store_planes(c + p + tile.plane, 0, new[S - 1 :], active, tile.mask, 1)
        if h_prev is not None:
            store_planes(h_prev + p + tile.plane, 0, state, active, tile.mask, 1)
            store_planes(c_prev + p + tile.plane, all_steps, state[1:], active, tile.mask, S - 1)
            store_planes(saved + p + tile.plane, all_steps, kept, active, tile.mask, R)
        state = select(active, new, state, S)

    store_planes(states + tile.row * H + tile.plane, step, state, tile.rows, tile.mask, S)


@triton.jit
def of_next(
    dstate, of_reset, dgh, w_hh, resets, dropout, t, T, B, tile, G: tl.constexpr,
    EARLY: tl.constexpr, H: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, RESET_STATES: tl.constexpr,
):  # fmt: skip
    """``dstate`` of what leaves step t, with what the gates of the step after it add to that of h,
    but late ones; and ``of_reset``, with what they add there, of states that enter at resets."""
    after = t - 1 if REVERSE else t + 1
    cut = cuts(resets, after, T, B, tile, REVERSE)
    on = tile.rows if RESET_STATES else tile.rows & (cut == 0)
    p_d = dgh + (tl.cast(after, tl.int64) * B + tile.row) * (G * H) + tile.o_b * (G * H)
    apart = dropout is not None or RESET_STATES
    sum = tl.zeros_like(dstate[0]) if apart else dstate[0]
    sums = add_products(
        (sum,), p_d, on, w_hh, tile, H, EARLY * H, H, 1, PRECISION, BLOCK_K
    )  # fmt: skip
    sum = sums[0]
    if dropout is not None:
        sum *= factors_of(dropout, tile, H)
    if RESET_STATES:
        of_reset = (of_reset[0] + tl.where(cut[:, None], sum, 0),) + of_reset[1:]
        sum = tl.where(cut[:, None], 0, sum)
    if apart:
        sum += dstate[0]
    return (sum,) + dstate[1:], of_reset


@specialised
def backward(
    dy,  # [T,B,H] or None
    dc,  # [T,B,H] or None
    w_hh,  # [G*H,H]
    gain,  # as in forward, and the next
    parameters,
    lengths,  # [B] or None
    resets,  # [T,B] or None
    dropout,  # as in forward, and the next two
    renew_h,
    renew_c,
    h_prev,  # [T,B,H]
    c_prev,  # [S-1,T,B,H] of type COMPUTE
    saved,  # [R,T,B,H]
    hats,  # as in forward, and the next two
    hats_of_state,
    scales,
    dgx,  # [T,B,G*H]
    dgh,  # [T,B,G*H], the same array where gx and gh have the same gradients
    dproduct,  # [T,B,G*H] of W_hh h where that is normalised, else None
    dstates,  # [S,B,H] of type COMPUTE: the gradients of what left step first, then of the rest
    dparameters,  # [..,B,H] of type COMPUTE, to which those of each row are added
    dreset,  # [S,B,H] likewise, of the states that enter at resets, or None: zeros do
    counters,  # [rows of programs] 0, where programs meet
    numbers,  # [NORM,N_H,2,B] of type COMPUTE, what they then tell each other
    rate_h: tl.float64,
    rate_c: tl.float64,
    T,
    B,
    first,  # of the steps from the last one on
    last,
    rows_before,
    CELL: tl.constexpr,
    OUTPUT: tl.constexpr,
    FIRST: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MEETS: tl.constexpr,
    NORM: tl.constexpr,
    LATE: tl.constexpr,
    ZONEOUT: tl.constexpr,
    ADDITIVE: tl.constexpr,
):
    N_H: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    PARAMS: tl.constexpr = K + 2 if NORM > 1 else K
    EARLY: tl.constexpr = G - LATE
    WITHIN: tl.constexpr = NORM + 1 if LATE > 0 else NORM
    storage: tl.constexpr = dgx.dtype.element_ty
    of_product = dgh if NORM == 0 else dproduct
    i_b, i_h = rows_before + tl.program_id(0) // N_H, tl.program_id(0) % N_H
    tile = tile_of(i_b, i_h, lengths, T, B, G, H, BLOCK_B, BLOCK_H)
    step = tl.cast(B, tl.int64) * H
    all_steps = T * step
    dstate = load_planes(dstates + tile.row * H + tile.plane, step, tile.mask, S, COMPUTE)
    of_units = ()  # what the cell's functions take last
    if K > 0:
        of_units = (load_of_units(parameters, tile, K, H, COMPUTE),)
    if NORM > 1:
        gain_of_state, bias_of_state = load_of_units(parameters + K * H, tile, 2, H, COMPUTE)
    sums = load_planes(dparameters + tile.row * H + tile.plane, step, tile.mask, PARAMS, COMPUTE)
    RESET_STATES: tl.constexpr = dreset is not None
    of_reset = ()
    if RESET_STATES:
        of_reset = load_planes(dreset + tile.row * H + tile.plane, step, tile.mask, S, COMPUTE)
    if N_H == 1:
        weights = ()
        for g in tl.static_range(G):
            weights += (load_weights(w_hh + g * H * H, tile.o_h, tile.units, tile, H, PRECISION),)

    for s in range(first, last):
        t = s if REVERSE else T - 1 - s
        i_t = tl.cast(t, tl.int64)
        active = tile.rows & (t < tile.length)
        on = tile.mask & active[:, None]
        p = i_t * step + tile.row * H
        state = load_planes(h_prev + p + tile.plane, 0, on, 1, COMPUTE)
        state += load_planes(c_prev + p + tile.plane, all_steps, on, S - 1, COMPUTE)
        kept = load_planes(saved + p + tile.plane, all_steps, on, R, COMPUTE)
        dnew = zeros(S, BLOCK_B, BLOCK_H, COMPUTE)
        if dy is not None:
            dnew = load_planes(dy + p + tile.plane, 0, on, 1, COMPUTE) + dnew[1:]
        if dc is not None:
            dnew = dnew[: S - 1] + load_planes(dc + p + tile.plane, 0, on, 1, COMPUTE)
        if N_H > 1:
            if s > 0:
                if MEETS:
                    wait(counters + i_b, N_H * (WITHIN + 1) * s)
                dstate, of_reset = of_next(
                    dstate, of_reset, of_product, w_hh, resets, dropout, t, T, B, tile, G, EARLY,
                    H, REVERSE, PRECISION, BLOCK_K, RESET_STATES,
                )  # fmt: skip
        dnew = add(dnew, dstate, S)
        if ZONEOUT:
            of_new = shares(renew_h, renew_c, rate_h, rate_c, p + tile.plane, on, S, COMPUTE)
            of_cell, past_cell = (), ()
            for n in tl.static_range(min(S, 2)):
                of_cell += (of_new[n] * dnew[n],)
                past_cell += ((1 - of_new[n]) * dnew[n],)
            dnew = of_cell + dnew[2:]

        upstream, of_norm = (dnew,), ()
        if LATE > 0:
            d_late = FIRST(state, kept, dnew, *of_units)
            p_late = dgh + p * G + EARLY * H
            store_planes(p_late + tile.gates, H, d_late, active, tile.mask, LATE)
            d = tl.zeros_like(dnew[0])
            if N_H == 1:
                for g in tl.static_range(LATE):
                    of_gate = operand(d_late[g].to(storage), PRECISION)
                    d = add_product(d, of_gate, weights[EARLY + g], PRECISION)
            else:
                arrive(counters + i_b)
                wait(counters + i_b, N_H * ((WITHIN + 1) * s + 1))
                of_late = add_products(
                    (d,), p_late + tile.o_b * (G * H), active, w_hh + EARLY * H * H, tile, H,
                    LATE * H, H, 1, PRECISION, BLOCK_K,
                )  # fmt: skip
                d = of_late[0]
            factors = factors_of(dropout, tile, H)
            upstream = dnew, d * entering(state[0], factors, storage)
            through_factor = d * kept[0]
            if dropout is not None:
                through_factor *= factors
        if NORM > 1:
            normal = load_planes(hats_of_state + p + tile.plane, 0, on, 1, COMPUTE)
            new = normal[0] * gain_of_state + bias_of_state
            d_gate, d = OUTPUT(kept, new, dnew[0])
            of_norm = (d * normal[0], d)
            scale = tl.load(scales + (T + i_t) * B + tile.row + tile.o_b, mask=active, other=0)
            met = meeting(counters, numbers, i_b, s, 1, B, N_H, WITHIN)
            d = of_normalised((d * gain_of_state,), normal, scale, met, tile, B, H, BLOCK_H, 1)
            upstream = d_gate, dnew[1] + d[0]
        found = CELL(state, kept, *upstream, *of_units)
        d_x, d_h, before = found[:3]
        d_units = of_norm
        if K > 0:
            d_units = found[3] + of_norm
        nothing = zeros(PARAMS, BLOCK_B, BLOCK_H, COMPUTE)
        sums = add(sums, select(active, d_units, nothing, PARAMS), PARAMS)
        if ZONEOUT:
            before = add(before, past_cell, min(S, 2)) + before[2:]
        if LATE > 0:
            before = (before[0] + through_factor,) + before[1:]
        store_planes(dgh + p * G + tile.gates, H, d_h, active, tile.mask, EARLY)
        if NORM > 0:
            normal = load_planes(hats + p * G + tile.gates, H, on, G, COMPUTE)
            scale = tl.load(scales + i_t * B + tile.row + tile.o_b, mask=active, other=0)
            met = meeting(counters, numbers, i_b, s, NORM, B, N_H, WITHIN)
            d = multiply(d_h, load_of_units(gain, tile, G, H, COMPUTE), G)
            d_h = of_normalised(d, normal, scale, met, tile, B, H, BLOCK_H, G)
            store_planes(dproduct + p * G + tile.gates, H, d_h, active, tile.mask, G)
        if MEETS:
            arrive(counters + i_b)
        if not ADDITIVE:
            store_planes(dgx + p * G + tile.gates, H, d_x, active, tile.mask, G)
        if N_H == 1:
            dh = before[0] if dropout is None else tl.zeros_like(before[0])
            for g in tl.static_range(EARLY):
                d = operand(d_h[g].to(storage), PRECISION)
                dh = add_product(dh, d, weights[g], PRECISION)
            if dropout is not None:
                dh = before[0] + dh * factors_of(dropout, tile, H)
            before = (dh,) + before[1:]
        dstate = select(active, before, dstate, S)
        anew = cuts(resets, t, T, B, tile, REVERSE)
        none = zeros(S, BLOCK_B, BLOCK_H, COMPUTE)
        if RESET_STATES:
            of_reset = add(of_reset, select(anew, dstate, none, S), S)
        dstate = select(anew, none, dstate, S)

    if N_H > 1:
        if last == T and (MEETS or first == T):  # each step with a launch of its own: so does this
            if MEETS:
                wait(counters + i_b, N_H * (WITHIN + 1) * T)
            t = T if REVERSE else -1
            dstate, of_reset = of_next(
                dstate, of_reset, of_product, w_hh, resets, dropout, t, T, B, tile, G, EARLY, H,
                REVERSE, PRECISION, BLOCK_K, RESET_STATES,
            )  # fmt: skip
    store_planes(dstates + tile.row * H + tile.plane, step, dstate, tile.rows, tile.mask, S)
    if RESET_STATES:
        store_planes(dreset + tile.row * H + tile.plane, step, of_reset, tile.rows, tile.mask, S)
    store_planes(dparameters + tile.row * H + tile.plane, step, sums, tile.rows, tile.mask, PARAMS)
