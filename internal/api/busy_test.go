package api

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/openlock/openlock/internal/clock"
)

// Invariant 15: under overload opens keep reserved capacity, and reads give way.
func TestReadsGiveWayToCommands(t *testing.T) {
	c, _ := clock.System(clock.Anchor{})
	s := &Server{clock: c, log: slog.New(slog.NewTextHandler(io.Discard, nil)), reads: make(chan struct{}, readsAtWork)}
	begun, finish := make(chan struct{}), make(chan struct{})
	answer := func(_ *Server, c *call) error {
		c.json(http.StatusOK, nil)
		return nil
	}
	slow := s.handler(route{method: "GET", do: func(s *Server, c *call) error {
		begun <- struct{}{}
		<-finish
		return answer(s, c)
	}})
	read := s.handler(route{method: "GET", do: answer})
	command := s.handler(route{method: "POST", do: answer})
	status := func(h http.Handler, method string) int {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, "/", nil))
		return w.Code
	}
	ended := make(chan int)
	for range readsAtWork {
		go func() { ended <- status(slow, "GET") }()
		<-begun
	}
	if code := status(command, "POST"); code != http.StatusOK {
		t.Errorf("a command beside busy reads: %d", code)
	}
	if code := status(read, "GET"); code != http.StatusServiceUnavailable {
		t.Errorf("one read too many: %d", code)
	}
	close(finish)
	for range readsAtWork {
		if code := <-ended; code != http.StatusOK {
			t.Errorf("a read that had its turn: %d", code)
		}
	}
	if code := status(read, "GET"); code != http.StatusOK {
		t.Errorf("a read once there is room: %d", code)
	}
}
