package broker

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/mochi-mqtt/server/v2/listeners"
	"github.com/openlock/openlock/internal/clock"
	"golang.org/x/sys/unix"
)

const (
	// helloWithin bounds the TLS handshake, and then the wait for CONNECT.
	helloWithin = 5 * time.Second
	// userTimeout is how long sent bytes may stay unacknowledged by the device's
	// TCP (TCP_USER_TIMEOUT): no more than a command's lifetime.
	userTimeout = 10 * time.Second
	// pauseFull is how long accepting rests when no file descriptor is free.
	pauseFull = 100 * time.Millisecond
)

// listener takes TLS connections with client certificates.
type listener struct {
	tcp   *net.TCPListener
	tls   *tls.Config
	clock clock.Clock
	log   *slog.Logger

	closing context.Context
	close   context.CancelFunc
	conns   sync.WaitGroup
}

func newListener(tcp *net.TCPListener, t *tls.Config, c clock.Clock, log *slog.Logger) *listener {
	l := &listener{tcp: tcp, tls: t, clock: c, log: log}
	l.closing, l.close = context.WithCancel(context.Background())
	return l
}

// Init implements listeners.Listener; the socket is already open.
func (l *listener) Init(*slog.Logger) error { return nil }

// ID implements listeners.Listener.
func (l *listener) ID() string { return "devices" }

// Address implements listeners.Listener.
func (l *listener) Address() string { return l.tcp.Addr().String() }

// Protocol implements listeners.Listener.
func (l *listener) Protocol() string { return "mqtts" }

// Serve implements listeners.Listener.
func (l *listener) Serve(establish listeners.EstablishFn) {
	for {
		c, err := l.tcp.AcceptTCP()
		switch {
		case l.closing.Err() != nil || errors.Is(err, net.ErrClosed):
			if c != nil {
				_ = c.Close()
			}
			return
		case err != nil:
			l.refused(err)
			time.Sleep(pauseFull)
		default:
			l.conns.Go(func() { l.shake(c, establish) })
		}
	}
}

func (l *listener) refused(err error) {
	if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
		l.log.Error("no file descriptor is free for another device: raise `ulimit -n`", "error", err)
		return
	}
	l.log.Error("a device's connection could not be accepted", "error", err)
}

// shake does the TLS handshake and hands the connection over. Who does not say
// CONNECT in time is cut off: the broker sets a new deadline once it has.
func (l *listener) shake(tcp *net.TCPConn, establish listeners.EstablishFn) {
	if err := setUserTimeout(tcp); err != nil {
		l.log.Error("TCP_USER_TIMEOUT could not be set", "error", err)
		_ = tcp.Close()
		return
	}
	c := tls.Server(newConn(tcp, l.clock), l.tls)
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithTimeout(l.closing, helloWithin)
	defer cancel()
	if err := c.HandshakeContext(ctx); err != nil {
		l.log.Info("TLS handshake with a device failed", "remote", tcp.RemoteAddr().String(), "error", err)
		return
	}
	_ = c.SetDeadline(time.Now().Add(helloWithin))
	if err := establish(l.ID(), c); err != nil {
		l.log.Info("device connection ended", "remote", tcp.RemoteAddr().String(), "error", err)
	}
}

func setUserTimeout(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds()))
	})
	return errors.Join(err, serr)
}

// Close implements listeners.Listener.
func (l *listener) Close(closeClients listeners.CloseFn) {
	l.close()
	_ = l.tcp.Close()
	closeClients(l.ID())
	l.conns.Wait()
}
