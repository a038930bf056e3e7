package broker

import (
	"errors"
	"net"
	"sync"
	"time"

	"github.com/openlock/openlock/internal/clock"
)

// errOverdue ends a connection whose device has not acknowledged a command in
// time.
var errOverdue = errors.New("broker: a command was not acknowledged before it expired")

// conn is a device's TCP connection, below TLS. While a command is on its way
// through it, it has a deadline: after that nothing more is written, and what
// the kernel still holds is thrown away with a reset. A polite close would
// still deliver it.
type conn struct {
	*net.TCPConn
	clock clock.Clock

	mu       sync.Mutex
	arming   *delivery            // the command being queued right now
	unacked  map[uint16]*delivery // by MQTT packet id
	timer    *time.Timer
	overdued bool
}

// delivery is a command in a connection.
type delivery struct {
	until   clock.Deadline
	acked   func()
	queued  bool
	id      uint16
	dropped bool
}

func newConn(c *net.TCPConn, ck clock.Clock) *conn {
	return &conn{TCPConn: c, clock: ck, unacked: map[uint16]*delivery{}}
}

// Write checks the deadline when the bytes are about to leave: the process may
// have been paused since they were queued.
func (c *conn) Write(p []byte) (int, error) {
	if c.overdue() {
		c.reset()
		return 0, errOverdue
	}
	return c.TCPConn.Write(p)
}

func (c *conn) overdue() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, d := range c.unacked {
		c.overdued = c.overdued || c.clock.Passed(d.until)
	}
	return c.overdued
}

// arm expects the next packet to be a command.
func (c *conn) arm(d *delivery) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.arming = d
}

// disarm ends the expectation and says whether the command was queued.
func (c *conn) disarm(d *delivery) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.arming = nil
	if d.dropped && d.queued {
		delete(c.unacked, d.id)
	}
	return d.queued && !d.dropped
}

// queue notes the packet id of the command that is being queued, before any
// byte of it can be written.
func (c *conn) queue(id uint16) {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := c.arming
	if d == nil || d.queued {
		return
	}
	d.queued, d.id = true, id
	c.unacked[id] = d
	c.timer = time.AfterFunc(max(0, c.clock.Left(d.until)), c.check)
}

// check resets the connection if a command in it is overdue.
func (c *conn) check() {
	if c.overdue() {
		c.reset()
	}
}

// drop notes that the queue was full.
func (c *conn) drop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.arming != nil {
		c.arming.dropped = true
	}
}

// ack notes that the device has a packet.
func (c *conn) ack(id uint16) {
	c.mu.Lock()
	d := c.unacked[id]
	delete(c.unacked, id)
	c.mu.Unlock()
	if d != nil && d.acked != nil {
		d.acked()
	}
}

// reset closes the connection without delivering what the kernel holds.
func (c *conn) reset() {
	_ = c.SetLinger(0)
	_ = c.TCPConn.Close()
}
