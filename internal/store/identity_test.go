package store

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"testing"
	"time"
)

func acme(t *testing.T) (context.Context, *DB) {
	t.Helper()
	ctx := testContext(t)
	db, _ := open(t)
	for _, id := range []string{"acme", "other"} {
		if err := db.CreateOrganization(ctx, Organization{ID: id, Name: "Name of " + id, CreatedAt: moment}); err != nil {
			t.Fatal(err)
		}
	}
	return ctx, db
}

func key(id string) Credential {
	return Credential{ID: id, Kind: APIKey, Hash: []byte("hash of " + id), Org: "acme", Name: "n", Scopes: []string{"lock:open", "lock:read"}, CreatedAt: moment}
}

func mustCreate(t *testing.T, db *DB, c Credential) {
	t.Helper()
	if err := db.CreateCredential(testContext(t), c); err != nil {
		t.Fatal(err)
	}
}

func mustRead(t *testing.T, db *DB, id string) Credential {
	t.Helper()
	c, err := db.Credential(testContext(t), "acme", id)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestOrganizations(t *testing.T) {
	ctx, db := acme(t)
	if err := db.CreateOrganization(ctx, Organization{ID: "acme"}); !errors.Is(err, ErrExists) {
		t.Errorf("twice: %v", err)
	}
	want := Organization{ID: "acme", Name: "Name of acme", CreatedAt: moment}
	if got, err := db.Organization(ctx, "acme"); err != nil || got != want {
		t.Errorf("%+v, want %+v (%v)", got, want, err)
	}
	if _, err := db.Organization(ctx, "nobody"); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown: %v", err)
	}
	if all, err := db.Organizations(ctx); err != nil || len(all) != 2 || all[0] != want {
		t.Errorf("list: %+v, %v", all, err)
	}
}

func TestCredentials(t *testing.T) {
	ctx, db := acme(t)
	want := key("k1")
	want.Super, want.ExpiresAt = true, moment.Add(time.Hour)
	mustCreate(t, db, want)
	got, err := db.CredentialByHash(ctx, want.Hash)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("by hash: %+v, want %+v (%v)", got, want, err)
	}
	if got := mustRead(t, db, "k1"); !reflect.DeepEqual(got, want) {
		t.Errorf("by id: %+v, want %+v", got, want)
	}
	if _, err := db.CredentialByHash(ctx, []byte("nobody's")); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown hash: %v", err)
	}
	if _, err := db.Credential(ctx, "other", "k1"); !errors.Is(err, ErrNotFound) {
		t.Errorf("another organisation's: %v", err)
	}
	stray := key("k2")
	stray.Org = "nobody"
	if err := db.CreateCredential(ctx, stray); !errors.Is(err, ErrNoOrganization) {
		t.Errorf("of no organisation: %v", err)
	}
	for _, taken := range []Credential{{ID: "k1", Hash: []byte("h")}, {ID: "k3", Hash: want.Hash}} {
		taken.Org, taken.Kind = "acme", APIKey
		if err := db.CreateCredential(ctx, taken); err == nil {
			t.Errorf("%+v shares an id or a secret", taken)
		}
	}
	client := key("c1")
	client.Kind = Client
	mustCreate(t, db, client)
	if all, err := db.Credentials(ctx, "acme", APIKey); err != nil || len(all) != 1 || all[0].ID != "k1" {
		t.Errorf("list: %+v, %v", all, err)
	}
}

// TestRotate: the old credential ends at the end of the overlap or earlier,
// never later than it would have anyway.
func TestRotate(t *testing.T) {
	ctx, db := acme(t)
	for i, c := range []struct{ before, ends, want time.Time }{
		{time.Time{}, moment.Add(time.Hour), moment.Add(time.Hour)},
		{moment.Add(time.Minute), moment.Add(time.Hour), moment.Add(time.Minute)},
		{moment.Add(24 * time.Hour), moment.Add(time.Hour), moment.Add(time.Hour)},
		{moment.Add(time.Minute), moment, moment},
	} {
		old, fresh := key(fmt.Sprint("old", i)), key(fmt.Sprint("new", i))
		old.ExpiresAt = c.before
		mustCreate(t, db, old)
		if err := db.RotateCredential(ctx, old.ID, c.ends, fresh); err != nil {
			t.Fatal(err)
		}
		if got := mustRead(t, db, old.ID).ExpiresAt; !got.Equal(c.want) {
			t.Errorf("would end at %v, overlap until %v: ends at %v", c.before, c.ends, got)
		}
		if got := mustRead(t, db, fresh.ID); !reflect.DeepEqual(got, fresh) {
			t.Errorf("the new one is %+v, want %+v", got, fresh)
		}
	}
}

func TestRotateRefuses(t *testing.T) {
	ctx, db := acme(t)
	mustCreate(t, db, key("k1"))
	if err := db.RotateCredential(ctx, "k1", moment, key("k1")); err == nil {
		t.Error("the new one has the old one's id")
	}
	if got := mustRead(t, db, "k1"); !got.ExpiresAt.IsZero() {
		t.Errorf("half a rotation: the old one ends at %v and there is no new one", got.ExpiresAt)
	}
	stray := key("k2")
	stray.Org = "other"
	if err := db.RotateCredential(ctx, "k1", moment, stray); !errors.Is(err, ErrNotFound) {
		t.Errorf("by another organisation: %v", err)
	}
	if err := db.RevokeCredential(ctx, "acme", "k1", moment); err != nil {
		t.Fatal(err)
	}
	if err := db.RotateCredential(ctx, "k1", moment, key("k3")); !errors.Is(err, ErrNotFound) {
		t.Errorf("a revoked one: %v", err)
	}
}

func TestRevoke(t *testing.T) {
	ctx, db := acme(t)
	mustCreate(t, db, key("k1"))
	if !mustRead(t, db, "k1").Stands(moment) {
		t.Error("does not stand before")
	}
	if err := db.RevokeCredential(ctx, "other", "k1", moment); !errors.Is(err, ErrNotFound) {
		t.Errorf("by another organisation: %v", err)
	}
	for i := range 2 { // again changes nothing
		if err := db.RevokeCredential(ctx, "acme", "k1", moment.Add(time.Duration(i)*time.Hour)); err != nil {
			t.Fatal(err)
		}
		if got := mustRead(t, db, "k1"); !got.RevokedAt.Equal(moment) || got.Stands(moment) {
			t.Errorf("revoked at %v, stands %v", got.RevokedAt, got.Stands(moment))
		}
	}
	if err := db.RevokeCredential(ctx, "acme", "k2", moment); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown: %v", err)
	}
}

func TestTouch(t *testing.T) {
	ctx, db := acme(t)
	mustCreate(t, db, key("k1"))
	mustCreate(t, db, key("k2"))
	for _, at := range []time.Time{moment, moment.Add(time.Hour), moment.Add(time.Minute)} { // the last comes late
		if err := db.TouchCredentials(ctx, map[string]time.Time{"k1": at, "nobody": at}); err != nil {
			t.Fatal(err)
		}
	}
	if got := mustRead(t, db, "k1").UsedAt; !got.Equal(moment.Add(time.Hour)) {
		t.Errorf("last used at %v", got)
	}
	if got := mustRead(t, db, "k2").UsedAt; !got.IsZero() {
		t.Errorf("never used, yet at %v", got)
	}
}

func TestRevoked(t *testing.T) {
	ctx, db := acme(t)
	ask := func(user, jti string, want bool) {
		t.Helper()
		if got, err := db.Revoked(ctx, user, jti); err != nil || got != want {
			t.Errorf("user %q, token %q: %v, want %v (%v)", user, jti, got, want, err)
		}
	}
	for range 2 { // again changes nothing
		if err := errors.Join(db.SuspendUser(ctx, "u", moment), db.RevokeToken(ctx, "j", moment)); err != nil {
			t.Fatal(err)
		}
	}
	ask("u", "", true)
	ask("", "j", true)
	ask("", "", false)
	ask("j", "u", false)
	if err := errors.Join(db.ReactivateUser(ctx, "u"), db.ReactivateUser(ctx, "nobody")); err != nil {
		t.Fatal(err)
	}
	ask("u", "", false)
	ask("u", "j", true)
}

func TestSettings(t *testing.T) {
	ctx, db := acme(t)
	if _, err := db.Setting(ctx, "a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown: %v", err)
	}
	for _, v := range []string{"1", "2"} {
		if err := db.SetSetting(ctx, "a", v); err != nil {
			t.Fatal(err)
		}
		if got, err := db.Setting(ctx, "a"); err != nil || got != v {
			t.Errorf("got %q, want %q (%v)", got, v, err)
		}
	}
}
