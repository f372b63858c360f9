import threading

import pytest

from chat_server import ProtocolServer


@pytest.fixture
def protocol():
    server = ProtocolServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
