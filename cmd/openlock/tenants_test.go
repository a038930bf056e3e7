package main

import (
	"errors"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/access"
	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/control"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/store"
)

// Whoever has to do with lock 1 of the tests about rights.
const (
	ownerOfOne  = "0b2a6a4e-51c5-4a5b-9d8e-000000000001"
	holderOfOne = "0b2a6a4e-51c5-4a5b-9d8e-000000000002"
)

// lockCalls calls every served route that concerns a lock, in an order that
// leaves lock 1 as it was, but for its history.
var lockCalls = []struct {
	apiRoute
	action access.Action
	body   any
}{
	{apiRoute{"POST", "/locks/{id}/AddKey"}, access.Manage, `{"keyUuid":"spare"}`},
	{apiRoute{"POST", "/locks/{id}/RemoveKey"}, access.Manage, `{"keyUuid":"spare"}`},
	{apiRoute{"POST", "/locks/{id}/SetOwner"}, access.Manage, `{"userId":"` + ownerOfOne + `"}`},
	{apiRoute{"POST", "/locks/{id}/SetOrganization"}, access.Manage, `{"orgId":"acme"}`},
	{apiRoute{"POST", "/locks/{id}/CreateLock"}, access.Manage, `{"index":1,"uuid":"uuid-of-1"}`},
	{apiRoute{"POST", "/locks/{id}/OpenLock"}, access.Open, nil},
	{apiRoute{"GET", "/locks/{id}/basic-info"}, access.Look, nil},
	{apiRoute{"GET", "/locks/{id}/details"}, access.Audit, nil},
	{apiRoute{"GET", "/locks/{id}/events"}, access.Audit, nil},
	{apiRoute{"GET", "/locks/{id}/commands"}, access.Audit, nil},
	{apiRoute{"GET", "/locks/{id}/commands/{command}"}, access.Audit, nil},
}

func TestEveryRouteOfALockIsTestedForRights(t *testing.T) {
	left := servedRoutes(t)
	for _, c := range lockCalls {
		delete(left, c.apiRoute)
	}
	for _, a := range lockRoutes(left) {
		t.Errorf("%s is served, but not in lockCalls", a)
	}
}

// one makes lock 1 of acme, with an owner, the holder of a key, and a command
// in its past. It answers with that command's id.
func (r *rig) one(acme creds) (command string) {
	r.t.Helper()
	r.want(r.send("POST", "/locks/1/CreateLock", acme, map[string]any{
		"index": 1, "uuid": "uuid-of-1", "serialNumber": "SN-of-1", "ownerId": ownerOfOne,
		"keys": []any{map[string]any{"uuid": "key-of-1", "userId": holderOfOne}},
	}), http.StatusCreated)
	return r.want(r.send("POST", openPath(1), acme, nil), http.StatusBadGateway).get("command", "id").(string)
}

// leaks says what a refusal tells of lock 1.
func leaks(a reply, command string) string {
	for _, s := range []string{"uuid-of-1", "SN-of-1", "key-of-1", ownerOfOne, holderOfOne, "acme", command, "version", "aggregateId"} {
		if strings.Contains(a.raw, s) {
			return s
		}
	}
	return ""
}

// mayOnly holds that a caller may do to lock 1 what is listed and nothing else.
func (r *rig) mayOnly(name string, c creds, command string, actions ...access.Action) {
	r.t.Helper()
	for _, call := range lockCalls {
		name := call.String() + " by " + name
		if !slices.Contains(actions, call.action) {
			r.refused(name, http.StatusForbidden, func() reply {
				a := r.send(call.method, call.at("1", command), c, call.body)
				if s := leaks(a, command); s != "" {
					r.t.Errorf("%s: the refusal tells %q: %s", name, s, a.raw)
				}
				return a
			})
			continue
		}
		a := r.send(call.method, call.at("1", command), c, call.body)
		want := http.StatusOK
		if call.action == access.Open {
			want = http.StatusBadGateway // there is no device
		}
		if a.status != want {
			r.t.Errorf("%s: %d, want %d: %s", name, a.status, want, a.raw)
		}
	}
}

func TestWhoMayDoWhatToALock(t *testing.T) {
	r := discreetRig(t)
	acme, beta, super := r.org("acme"), r.org("beta"), r.super()
	owner, holder := r.tokenOf(ownerOfOne), r.tokenOf(holderOfOne)
	_, stranger := r.user()
	command := r.one(acme)
	service := func(org string, scopes ...string) creds { _, c := r.service(org, scopes...); return c }
	const open, look, audit, manage = access.Open, access.Look, access.Audit, access.Manage
	for name, c := range map[string]struct {
		creds
		may []access.Action
	}{
		"super key":               {super, []access.Action{open, look, audit, manage}},
		"its organization":        {acme, []access.Action{open, look, audit, manage}},
		"key that may open":       {r.org("acme", "locks:open"), []access.Action{open}},
		"key that may read":       {r.org("acme", "locks:read"), []access.Action{look, audit}},
		"key that may manage":     {r.org("acme", "locks:manage"), []access.Action{manage}},
		"key that may two":        {r.org("acme", "locks:open", "locks:read"), []access.Action{open, look, audit}},
		"service":                 {service("acme"), []access.Action{open, look, audit, manage}},
		"service that may open":   {service("acme", "locks:open"), []access.Action{open}},
		"service that may read":   {service("acme", "locks:read"), []access.Action{look, audit}},
		"service that may manage": {service("acme", "locks:manage"), []access.Action{manage}},
		"owner":                   {owner, []access.Action{open, look, audit, manage}},
		"holder of a key":         {holder, []access.Action{open, look}},

		"stranger":                                 {stranger, nil},
		"another organization":                     {beta, nil},
		"another organization's service":           {service("beta"), nil},
		"another organization with the owner":      {creds{beta.key, owner.token}, nil},
		"another organization with the holder":     {creds{beta.key, holder.token}, nil},
		"the organization for a stranger":          {creds{acme.key, stranger.token}, []access.Action{open, look, audit, manage}},
		"a key that may read with the owner":       {creds{r.org("acme", "locks:read").key, owner.token}, []access.Action{look, audit}},
		"a key that may read with a wider service": {creds{r.org("acme", "locks:read").key, service("acme").token}, []access.Action{look, audit}},
		"super with a stranger":                    {creds{super.key, stranger.token}, []access.Action{open, look, audit, manage}},
	} {
		r.mayOnly(name, c.creds, command, c.may...)
		for _, call := range lockCalls {
			if call.path != "/locks/{id}/CreateLock" {
				r.refused(name+" on an unknown lock", http.StatusNotFound, func() reply {
					return r.send(call.method, call.at("404", command), c.creds, call.body)
				})
			}
		}
	}
	for _, call := range lockCalls {
		for name, c := range map[string]creds{"nobody": {}, "unknown key": {key: "olk_x"}, "unknown token": {token: "x"}} {
			for _, id := range []string{"1", "404"} {
				r.refused(call.String()+" by "+name, http.StatusUnauthorized, func() reply {
					a := r.send(call.method, call.at(id, command), c, call.body)
					if s := leaks(a, command); s != "" {
						t.Errorf("%s: the refusal tells %q", call, s)
					}
					return a
				})
			}
		}
	}
	checkState(t, r.db, 1, everything(t, r.db, 1))
}

func TestAKeyThatWasTakenAwayOpensNothing(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	command := r.one(acme)
	holder := r.tokenOf(holderOfOne)
	heir, ofHeir := r.user()
	r.mayOnly("the holder", holder, command, access.Open, access.Look)
	r.want(r.send("POST", "/locks/1/AddKey", acme, map[string]any{"keyUuid": "key-of-1", "userId": heir}), http.StatusOK)
	r.mayOnly("who held the key before", holder, command)
	r.mayOnly("who holds it now", ofHeir, command, access.Open, access.Look)
	r.want(r.send("POST", "/locks/1/RemoveKey", acme, `{"keyUuid":"key-of-1"}`), http.StatusOK)
	r.mayOnly("whom it was taken from", ofHeir, command)
}

func TestWhoMayCreateALockAndWhoseItIs(t *testing.T) {
	r := discreetRig(t)
	acme, beta, super := r.org("acme"), r.org("beta"), r.super()
	me, user := r.user()
	other, _ := r.user()
	create := func(id lock.ID, c creds, owner string) reply {
		body := map[string]any{"index": id, "uuid": "new-" + id.String()}
		if owner != "" {
			body["ownerId"] = owner
		}
		return r.send("POST", "/locks/"+id.String()+"/CreateLock", c, body)
	}
	for i, c := range []struct {
		creds
		given, owner, org string
		status            int
	}{
		{acme, "", "", "acme", http.StatusCreated},
		{acme, other, other, "acme", http.StatusCreated},
		{creds{acme.key, user.token}, "", "", "acme", http.StatusCreated},
		{r.org("acme", "locks:manage"), "", "", "acme", http.StatusCreated},
		{r.org("acme", "locks:open", "locks:read"), "", "", "", http.StatusForbidden},
		{user, "", me, "", http.StatusCreated},
		{user, me, me, "", http.StatusCreated},
		{user, other, "", "", http.StatusForbidden},
		{super, "", "", "", http.StatusCreated},
		{super, other, other, "", http.StatusCreated},
		{creds{}, "", "", "", http.StatusUnauthorized},
	} {
		id := lock.ID(i + 1)
		if c.status != http.StatusCreated {
			r.refused(id.String(), c.status, func() reply { return create(id, c.creds, c.given) })
			r.want(create(id, beta, ""), http.StatusCreated) // the id is still free
			continue
		}
		r.want(create(id, c.creds, c.given), c.status)
		a := r.want(r.send("GET", "/locks/"+id.String()+"/details", super, nil), http.StatusOK)
		if owner, _ := a.get("ownerId").(string); owner != c.owner || a.get("orgId") != c.org {
			t.Errorf("%d: of owner %q and organization %q: %s", i, c.owner, c.org, a.raw)
		}
		if c.org != "beta" {
			r.refused("CreateLock on another's id", http.StatusForbidden, func() reply { return create(id, beta, "") })
		}
	}
}

func TestAUsersLockIsNoOrganizations(t *testing.T) {
	r := discreetRig(t)
	acme := r.org("acme")
	_, service := r.service("acme")
	owner := r.tokenOf(ownerOfOne)
	command := r.one(owner)
	all := []access.Action{access.Open, access.Look, access.Audit}
	for name, c := range map[string]creds{"organization": acme, "service": service, "organization with the owner": {acme.key, owner.token}} {
		r.mayOnly(name, c, command)
	}
	r.mayOnly("holder", r.tokenOf(holderOfOne), command, access.Open, access.Look)
	for _, c := range []creds{owner, r.super()} {
		for _, call := range lockCalls {
			if slices.Contains(all, call.action) && call.action != access.Open {
				r.want(r.send(call.method, call.at("1", command), c, nil), http.StatusOK)
			}
		}
		r.want(r.send("POST", openPath(1), c, nil), http.StatusBadGateway)
	}
}

// readable is what a caller can read of a lock: types of events by version, and
// the ids of commands.
func (r *rig) readable(c creds) (events map[float64]string, commands []string) {
	r.t.Helper()
	events = map[float64]string{}
	page := r.want(r.send("GET", "/locks/1/events", c, nil), http.StatusOK)
	if page.get("totalPages") != 1.0 {
		r.t.Fatalf("more than one page: %s", page.raw)
	}
	for _, e := range page.get("events").([]any) {
		e := e.(map[string]any)
		events[e["version"].(float64)] = e["type"].(string)
	}
	for _, one := range r.want(r.send("GET", "/locks/1/commands", c, nil), http.StatusOK).get("commands").([]any) {
		commands = append(commands, one.(map[string]any)["id"].(string))
	}
	return events, commands
}

func (r *rig) reads(name string, c creds, wantEvents map[float64]string, wantCommands ...string) {
	r.t.Helper()
	events, commands := r.readable(c)
	if !maps.Equal(events, wantEvents) || !slices.Equal(commands, wantCommands) {
		r.t.Errorf("%s reads %v, %v; want %v, %v", name, events, commands, wantEvents, wantCommands)
	}
}

func TestANewOrganizationReadsOnlyWhatWasRecordedForIt(t *testing.T) {
	r := discreetRig(t)
	acme, beta, owner := r.org("acme"), r.org("beta"), r.tokenOf(ownerOfOne)
	ofAcme := r.one(acme) // versions 1 to 3
	r.reads("acme", acme, map[float64]string{1: "LockCreated", 2: "LockOpenRequested", 3: "LockOpenFailed"}, ofAcme)

	r.refused("an organization that is not there", http.StatusForbidden, func() reply {
		return r.send("POST", "/locks/1/SetOrganization", beta, `{"orgId":"nobody"}`) // nor may beta learn that
	})
	r.want(r.send("POST", "/locks/1/SetOrganization", acme, `{"orgId":"beta"}`), http.StatusOK)
	r.mayOnly("the old organization", acme, ofAcme)
	r.reads("beta", beta, map[float64]string{4: "OrganizationSet"})
	r.refused("a command of the old organization's", http.StatusForbidden, func() reply {
		return r.send("GET", "/locks/1/commands/"+ofAcme, beta, nil)
	})
	for _, page := range []string{"?page=1", "?page=2", "?page=999"} {
		a := r.want(r.send("GET", "/locks/1/events"+page, beta, nil), http.StatusOK)
		if strings.Contains(a.raw, "LockCreated") || strings.Contains(a.raw, ofAcme) {
			t.Errorf("%s: beta reads %s", page, a.raw)
		}
	}
	if a := r.send("GET", "/locks/1/commands?before=~", beta, nil); strings.Contains(a.raw, ofAcme) {
		t.Errorf("beta reads %s", a.raw)
	}

	ofBeta := r.want(r.send("POST", openPath(1), beta, nil), http.StatusBadGateway).get("command", "id").(string)
	r.reads("beta", beta, map[float64]string{4: "OrganizationSet", 5: "LockOpenRequested", 6: "LockOpenFailed"}, ofBeta)
	r.want(r.send("GET", "/locks/1/commands/"+ofBeta, beta, nil), http.StatusOK)
	whole := map[float64]string{1: "LockCreated", 2: "LockOpenRequested", 3: "LockOpenFailed", 4: "OrganizationSet", 5: "LockOpenRequested", 6: "LockOpenFailed"}
	r.reads("the owner, who stayed", owner, whole, ofBeta, ofAcme)
	r.reads("the operator", r.super(), whole, ofBeta, ofAcme)

	r.want(r.send("POST", "/locks/1/SetOrganization", beta, `{"orgId":"acme"}`), http.StatusOK)
	r.reads("acme, again", acme, map[float64]string{7: "OrganizationSet"})
	r.mayOnly("the one in between", beta, ofBeta)
	for _, e := range everything(t, r.db, 1) {
		if want := map[bool]string{true: "beta", false: "acme"}[e.Version >= 4 && e.Version <= 6]; e.Org != want {
			t.Errorf("event %d was recorded for %q", e.Version, e.Org)
		}
	}
}

func TestANewOwnerReadsOnlyWhatWasRecordedSince(t *testing.T) {
	r := discreetRig(t)
	old := r.tokenOf(ownerOfOne)
	heir, ofHeir := r.user()
	before := r.one(old)
	r.want(r.send("POST", "/locks/1/SetOwner", old, map[string]any{"userId": heir}), http.StatusOK)
	r.mayOnly("the old owner", old, before)
	r.reads("the new owner", ofHeir, map[float64]string{4: "OwnerSet"})
	r.refused("a command of the old owner's", http.StatusForbidden, func() reply {
		return r.send("GET", "/locks/1/commands/"+before, ofHeir, nil)
	})
	r.want(r.send("POST", openPath(1), ofHeir, nil), http.StatusBadGateway)
}

func TestACommandIsReadOnlyThroughItsOwnLock(t *testing.T) {
	r := discreetRig(t)
	acme, beta := r.org("acme"), r.org("beta")
	command := r.one(acme)
	r.createLock(2, acme)
	r.createLock(3, beta)
	r.want(r.send("GET", "/locks/1/commands/"+command, acme, nil), http.StatusOK)
	r.refused("another lock of the same organization", http.StatusNotFound, func() reply { return r.send("GET", "/locks/2/commands/"+command, acme, nil) })
	r.refused("another organization's lock", http.StatusNotFound, func() reply { return r.send("GET", "/locks/3/commands/"+command, beta, nil) })
	r.refused("another organization", http.StatusForbidden, func() reply { return r.send("GET", "/locks/3/commands/"+command, acme, nil) })
	r.refused("no command", http.StatusNotFound, func() reply { return r.send("GET", "/locks/1/commands/nothing", acme, nil) })
}

// Who has ended between the check of their credentials and the record records
// nothing: the record asks again.
func TestNothingIsRecordedForACredentialThatHasJustEnded(t *testing.T) {
	r := discreetRig(t)
	r.one(r.org("acme"))
	r.device(1)
	key, c := r.credential("acme", store.APIKey)
	client, service := r.service("acme")
	owner := r.tokenOf(ownerOfOne)
	token, claims, err := r.issuer.User(ownerOfOne, time.Hour, time.Now())
	r.must(err)
	who := auth.NewAuthenticator(r.db, r.issuers, r.issuer, r.clock)
	for _, one := range []struct {
		what string
		creds
		end func() error
	}{
		{"key", creds{key: key}, func() error { return r.registry.Revoke(t.Context(), store.APIKey, "acme", c.ID) }},
		{"client", service, func() error { return r.registry.Revoke(t.Context(), store.Client, "acme", client) }},
		{"token", creds{token: token}, func() error { return r.registry.RevokeToken(t.Context(), claims.ID) }},
		{"user", owner, func() error { return r.registry.SuspendUser(t.Context(), ownerOfOne) }},
	} {
		p, err := who.Request(r.request("POST", "/", one.creds, nil))
		r.must(err)
		r.must(one.end())
		before := r.trace()
		request := control.Request{By: p, Lock: 1, Received: r.clock.In(0), Fingerprint: []byte("x"), IdempotencyKey: one.what}
		_, err = r.control.Open(t.Context(), request, control.OpenRequest{})
		_, err2 := r.control.Do(t.Context(), request, lock.AddKey{Key: lock.Key{UUID: "k"}})
		if !errors.Is(err, auth.ErrUnauthenticated) || !errors.Is(err2, auth.ErrUnauthenticated) || r.trace() != before {
			t.Errorf("%s that has ended: %v, %v", one.what, err, err2)
		}
	}
}
