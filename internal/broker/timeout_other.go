//go:build !linux

package broker

import "net"

// setUserTimeout has nothing to set here: a connection that has not
// acknowledged a command is reset by the outbox all the same.
func setUserTimeout(*net.TCPConn) error { return nil }
