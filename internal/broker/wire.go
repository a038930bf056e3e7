package broker

import (
	"errors"
	"net"
	"sync/atomic"
	"time"

	"github.com/openlock/openlock/internal/clock"
)

// writeWithin bounds one write: a device that does not read is not connected.
const writeWithin = 5 * time.Second

// errLate ends a connection over which a command can no longer arrive in time.
var errLate = errors.New("broker: a command was not acknowledged before it expired")

// wire is a device's TCP connection, below TLS. A write may have a deadline; it
// is checked when the bytes are about to leave, because the process may have
// been paused since they were encoded, and while they leave.
type wire struct {
	*net.TCPConn
	clock clock.Clock
	until atomic.Pointer[clock.Deadline] // of what is being written, nil for none
}

func newWire(c *net.TCPConn, ck clock.Clock) *wire { return &wire{TCPConn: c, clock: ck} }

// Write implements net.Conn.
func (w *wire) Write(p []byte) (int, error) {
	within := writeWithin
	if until := w.until.Load(); until != nil {
		if within = min(within, w.clock.Left(*until)); within <= 0 {
			return 0, errLate
		}
	}
	if err := w.SetWriteDeadline(time.Now().Add(within)); err != nil {
		return 0, err
	}
	return w.TCPConn.Write(p)
}

// reset closes the connection and throws away what the kernel still holds: a
// polite close would deliver it.
func (w *wire) reset() {
	_ = w.SetLinger(0)
	_ = w.TCPConn.Close()
}
