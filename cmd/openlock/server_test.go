package main

import (
	"net"
	"net/http"
	"testing"
	"time"
)

// Connections that were opened in reserve do not hold up the end.
func TestSilentConnectionsDoNotHoldUpTheEnd(t *testing.T) {
	r := newRig(t, func(c *config) { c.drain = time.Second })
	for range 3 {
		c, err := net.Dial("tcp", r.http.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
	}
	r.want(r.send("GET", "/health", creds{}, nil), http.StatusOK) // the server has taken the three before this one
	if err := r.close(); err != nil {
		t.Error(err)
	}
	r.server = nil
}
