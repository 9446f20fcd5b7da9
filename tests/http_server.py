"""A web server of a folder's files, as object stores and CDNs have them: ranges, perhaps a listing.

It can be told to misbehave: no ranges, no listing, answers that end early.
"""

import contextlib
import http.server
import re
import threading
import urllib.parse
from pathlib import Path


class _Handler(http.server.SimpleHTTPRequestHandler):
    """`server` has: root, ranges, listing, torn (how many answers to GET end early), asked."""

    protocol_version = "HTTP/1.1"

    def translate_path(self, path):
        return str(self.server.root) + urllib.parse.unquote(path.partition("?")[0])

    def log_message(self, *args):
        pass

    def list_directory(self, path):
        if self.server.listing:
            return super().list_directory(path)
        self.send_error(404)
        return None

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        self.server.asked.append((path.name, self.headers.get("Range")))
        if not path.is_file():
            return super().do_GET()
        data, status = path.read_bytes(), 200
        size = len(data)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.server.ranges:
            first, last = int(wanted[1]), min(int(wanted[2] or size), size - 1)
            data, status = data[first : last + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if self.server.torn and len(data) > 1000:
            self.server.torn -= 1
            data, self.close_connection = data[:-100], True
        self.wfile.write(data)


@contextlib.contextmanager
def serve(root, *, ranges=True, listing=True):
    """(URL, server) of the files under `root`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.root, server.ranges, server.listing = root, ranges, listing
    server.torn, server.asked = 0, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
