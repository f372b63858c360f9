"""Fills a store at an address, and sends it row by row, for the tests that kill it meanwhile."""

import sys

from bpo.store import objects, snapshot, upload
from store_writer import write

SEGMENT_BYTES = 1500


def send_often():
    """Small segments, small steps, and hardly a pause between them."""
    snapshot.SEGMENT_BYTES = upload.SEGMENT_BYTES = SEGMENT_BYTES
    upload._STEP_BYTES = 8 * SEGMENT_BYTES
    upload._SECONDS_BETWEEN_UPLOADS = 0.005


def fill(url, total, pause=0.0):
    with upload.writing(url) as (directory, check):
        write(directory, total, pause=pause)
        check()


if __name__ == "__main__":
    send_often()
    put = objects.Objects.write

    def told(self, name, data):
        put(self, name, data)
        print("put", flush=True)

    objects.Objects.write = told
    fill(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
