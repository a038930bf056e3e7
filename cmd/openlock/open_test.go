package main

import (
	"net/http"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/device"
)

func TestADoorOpensBecauseAnHTTPCallSaidSo(t *testing.T) {
	r := newRig(t)
	acme := r.org("acme")
	_, user := r.user()
	r.createLock(123, acme)
	d := r.device(123)

	a := r.want(r.send("POST", openPath(123), creds{key: acme.key, token: user.token},
		map[string]any{"requestId": "r-1", "reason": "delivery"}), http.StatusOK)

	if a.get("success") != true || a.get("aggregateId") != "123" || a.get("version") != 2.0 ||
		a.get("event", "type") != "LockOpenRequested" || a.get("event", "data", "reason") != "delivery" ||
		a.get("event", "data", "requestId") != "r-1" {
		t.Errorf("answer %s", a.raw)
	}
	if e := d.await(device.Opened); e.CommandID != a.get("command", "id") {
		t.Errorf("device opened for %s, answer names %v", e.CommandID, a.get("command", "id"))
	}
	end := r.outcome(acme, 123, a.get("command", "id"))
	if end.get("outcome") != "opened" || end.get("confirmedBy") != "device" {
		t.Errorf("outcome %s", end.raw)
	}
}

func TestAnOfflineLockAnswers502AndNothingWaitsForIt(t *testing.T) {
	r := newRig(t)
	acme := r.org("acme")
	r.createLock(7, acme)
	a := r.want(r.send("POST", openPath(7), acme, nil), http.StatusBadGateway)
	if a.get("error") != "Error" || a.get("reason") != "not_sent" || a.get("command", "outcome") != "failed" || a.get("command", "reason") != "offline" {
		t.Errorf("answer %s", a.raw)
	}
	d := r.device(7)
	a = r.want(r.send("POST", openPath(7), acme, nil, "Prefer", "wait=20"), http.StatusOK)
	if d.await(device.Opened).CommandID != a.get("command", "id") {
		t.Error("the first command came late")
	}
	if n := d.openings(); n != 0 {
		t.Errorf("the door moved %d times more", n)
	}
}

func TestPreferWaitAnswersWithTheOutcome(t *testing.T) {
	r := newRig(t)
	acme := r.org("acme")
	r.createLock(7, acme)
	r.device(7, func(c *device.Config) { c.Faults.Jam = true })
	a := r.want(r.send("POST", openPath(7), acme, nil, "Prefer", "respond-async, wait=25"), http.StatusOK)
	if a.header.Get("Preference-Applied") != "wait=25" || a.get("command", "outcome") != "failed" || a.get("command", "reason") != "jammed" {
		t.Errorf("answer %s, %v", a.raw, a.header)
	}
}

func TestALostAckExpires(t *testing.T) {
	r := newRig(t, func(c *config) { c.settings.Expiry, c.settings.Skew = 2*time.Second, 100*time.Millisecond })
	acme := r.org("acme")
	r.createLock(7, acme)
	d := r.device(7, func(c *device.Config) { c.Faults.LoseAck = true })
	a := r.want(r.send("POST", openPath(7), acme, nil), http.StatusOK)
	d.await(device.Opened)
	end := r.outcome(acme, 7, a.get("command", "id"))
	if end.get("outcome") != "expired" || end.get("delivered") != "yes" || end.get("confirmedBy") != "nobody" {
		t.Errorf("outcome %s", end.raw)
	}
}

func TestARepeatIsTheSameCommand(t *testing.T) {
	r := newRig(t)
	acme := r.org("acme")
	r.createLock(7, acme)
	d := r.device(7)
	body := map[string]any{"requestId": "once", "reason": "x"}
	one := r.want(r.send("POST", openPath(7), acme, body, "Prefer", "wait=20"), http.StatusOK)
	two := r.want(r.send("POST", openPath(7), acme, body), http.StatusOK)
	if two.header.Get("Idempotent-Replayed") != "true" || two.get("command", "id") != one.get("command", "id") ||
		two.get("version") != one.get("version") || two.get("command", "outcome") != "opened" {
		t.Errorf("first %s, repeat %s", one.raw, two.raw)
	}
	r.want(r.send("POST", openPath(7), acme, map[string]any{"requestId": "once", "reason": "y"}), http.StatusUnprocessableEntity)
	if n := d.openings(); n != 1 {
		t.Errorf("the door moved %d times", n)
	}
}

// An open lives as long as the request says, else as its organization has it,
// else 10 s; always from the receipt of the request.
func TestHowLongAnOpenLives(t *testing.T) {
	r := newRig(t)
	acme, operator := r.org("acme"), r.super()
	r.createLock(7, acme)
	r.device(7)
	life := func(body any) time.Duration {
		t.Helper()
		a := r.want(r.send("POST", openPath(7), acme, body), http.StatusOK)
		issued, err1 := time.Parse(time.RFC3339, a.get("command", "issuedAt").(string))
		expires, err2 := time.Parse(time.RFC3339, a.get("command", "expiresAt").(string))
		if err1 != nil || err2 != nil {
			t.Fatalf("times in %s", a.raw)
		}
		return expires.Sub(issued)
	}
	if d := life(nil); d != 10*time.Second {
		t.Errorf("by default %s", d)
	}
	r.want(r.send("POST", "/admin/organizations/acme/open-expiry", operator, map[string]any{"openExpirySeconds": 15}), http.StatusOK)
	if d := life(nil); d != 15*time.Second {
		t.Errorf("by its organization %s", d)
	}
	if d := life(map[string]any{"expiresInSeconds": 2}); d != 2*time.Second {
		t.Errorf("by request %s", d)
	}
	for _, n := range []any{0, 1, 31, -5, 2.5, "5"} {
		r.want(r.send("POST", openPath(7), acme, map[string]any{"expiresInSeconds": n}), http.StatusBadRequest)
		if n != 0 {
			r.want(r.send("POST", "/admin/organizations/acme/open-expiry", operator, map[string]any{"openExpirySeconds": n}), http.StatusBadRequest)
		}
	}
	r.want(r.send("POST", "/admin/organizations/nobody/open-expiry", operator, map[string]any{"openExpirySeconds": 15}), http.StatusNotFound)
}
