"""TEMP"""

from __future__ import annotations

import numpy as np
import torch

DT = {
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "float": np.float32,
    "double": np.float64,
    "timestamp[us, tz=UTC]": np.int64,
}
from vlm_dagster.loaders.batch import JaggedSequence
from vlm_dagster.sealed.gathering import Placement, width_of


def form_sequences(form, pieces, traits, buffers, *, num_padding=0):
    lengths = np.concatenate([a.lengths[r] for a, r in pieces] + [np.zeros(num_padding, np.int64)])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    values = {}
    if form == "views":
        tot = 0
        plans = []
        starts_out = []
        for a, r in pieces:
            s = a.starts[r]
            l = a.lengths[r]
            some = l > 0
            o = np.argsort(s[some], kind="stable")
            ss = s[some][o]
            ee = np.maximum.accumulate(ss + l[some][o])
            new = np.append(True, ss[1:] > ee[:-1]) if len(ss) else np.zeros(0, bool)
            ist = ss[new]
            iend = ee[np.append(np.flatnonzero(new)[1:] - 1, len(ss) - 1)] if len(ss) else ist
            cnt = iend - ist
            tgt = tot + np.cumsum(cnt) - cnt
            k = np.searchsorted(ist, s, side="right") - 1
            starts_out.append(
                np.where(some, tgt[k] + s - ist[k], 0) if len(ist) else np.zeros(len(s), np.int64)
            )
            plans.append((a, ist, cnt, tgt))
            tot += int(cnt.sum())
        for n in traits:
            kind = pieces[0][0].columns[n].type
            w = width_of(kind)
            out = buffers.empty(tot, DT[str(kind)])
            for a, i, c, t in plans:
                if len(i):
                    Placement(i, c, t).copy(a.columns[n], out.view(f"u{w}"))
            values[n] = torch.from_numpy(out)
        s = np.concatenate(starts_out + [np.zeros(num_padding, np.int64)])
        return JaggedSequence.views(values, torch.from_numpy(s), torch.from_numpy(lengths))
    at = 0
    plans = []
    for a, r in pieces:
        l = a.lengths[r]
        some = l > 0
        t = at + np.cumsum(l) - l
        plans.append((a, Placement(a.starts[r][some], l[some], t[some])))
        at += int(l.sum())
    for n in traits:
        kind = pieces[0][0].columns[n].type
        if width_of(kind) is None:
            values[n] = torch.cat(
                [
                    torch.from_numpy(
                        np.concatenate(
                            [
                                a.columns[n].slice(int(s), int(k)).to_numpy(zero_copy_only=False)
                                for s, k in zip(a.starts[r], a.lengths[r])
                            ]
                            + [np.zeros(0, bool)]
                        )
                    )
                    for a, r in pieces
                ]
            )
            continue
        out = buffers.empty(at, DT[str(kind)])
        for a, p in plans:
            p.copy(a.columns[n], out.view(f"u{width_of(kind)}"))
        values[n] = torch.from_numpy(out)
    return JaggedSequence.expanded(values, torch.from_numpy(offsets))
