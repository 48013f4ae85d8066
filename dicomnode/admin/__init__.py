"""HTTP administration: health, metrics, dashboard and the JSON API of the sidecar.

There is no authentication in this version. Therefore the server listens on a loopback
address by default, changes are accepted only there and with a header that a foreign web
page cannot send, and no page or answer carries patient data.
"""
