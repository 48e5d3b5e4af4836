"""Another process that reads buckets from a GPU's memory, as an engine's worker does.

In: an address and the number of buckets, as JSON on stdin. Out: the sum of each bucket,
and the seconds that taking all of them took.
"""

import json
import sys
import time

import torch

from megatron_eopd.errors import TransferError
from megatron_eopd.weight_sync.ring import RingReader


def main() -> None:
    given = json.loads(sys.stdin.readline())
    torch.cuda.init()
    reader = RingReader(given["address"])
    sums, begin = [], time.perf_counter()
    try:
        for _ in range(given["count"]):
            copy = reader.take()
            sums.append(int(copy.view(torch.int64).sum()))
            if given["die_after"] == len(sums):
                return
    except TransferError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    print(json.dumps({"sums": sums, "seconds": time.perf_counter() - begin}), flush=True)
    reader.close()


if __name__ == "__main__":
    main()
