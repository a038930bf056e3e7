package main

import (
	"net/http"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/device"
)

// Invariant 8: a device that was revoked is cut off within 5 s, and its lock is
// offline. Enrolled anew, it works again.
func TestRevokedDevice(t *testing.T) {
	r := newRig(t)
	acme := r.org("acme")
	r.createLock(7, acme)
	d := r.device(7)
	revoked := time.Now()
	if err := r.db.RevokeCertificates(t.Context(), "lock-7", revoked); err != nil {
		t.Fatal(err)
	}
	d.await(device.Disconnected)
	if took := time.Since(revoked); took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
	d.await(device.Unreachable)
	r.want(r.send("POST", openPath(7), acme, nil), http.StatusBadGateway)
	d.stop()

	dir := t.TempDir() + "/again"
	if err := r.enroll(t.Context(), 7, dir); err != nil {
		t.Fatal(err)
	}
	again := r.device(7, func(c *device.Config) {
		fresh := deviceConfig(7, dir, c.Broker)
		c.CertFile, c.KeyFile = fresh.CertFile, fresh.KeyFile
	})
	r.want(r.send("POST", openPath(7), acme, nil), http.StatusOK)
	again.await(device.Opened)
}
